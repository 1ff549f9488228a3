"""The benchmarks of a GPU without one: sizes, graphs, checks, a run, tables, and the steps of ``make gpu``."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # `bench` is no part of the installed package

from bench import __main__ as main  # noqa: E402
from bench import limits, report, suite  # noqa: E402
from lowrank_kernels.benchmark import check, harness, machine, providers, timing  # noqa: E402
from lowrank_kernels.benchmark.case import Case  # noqa: E402
from lowrank_kernels.benchmark.ops import OURS  # noqa: E402

TINY = suite.SIZES["cuda"].chosen([(96, 128)], [5])


def test_weights_exceed_the_l2(monkeypatch):
    monkeypatch.setattr(machine, "l2_bytes", lambda: 60 << 20)
    linear = suite.SIZES["cuda"].cases("linear_4bit")
    assert len(linear) == 3 * 6
    assert {(c.device, c.dtype, c.cache) for c in linear} == {("cuda", "bfloat16", "cold")}
    for case in linear:
        for nbytes in (case.weight_bytes, 2 * case.N * case.K):
            count = providers.copies(case, nbytes)
            assert count >= 2 and count * nbytes >= 3 * (60 << 20)
    assert providers.copies(linear[-1], 2 << 30) == 2


# -- graphs ------------------------------------------------------------------------------------------


class FakeDevice(timing.Device):
    """Runs calls on the CPU, each of which "takes" a microsecond; captures if it is let to."""

    def __init__(self, capturable: bool = True):
        self.capturable, self.captured = capturable, []

    def capture(self, calls):
        if not self.capturable:
            raise timing.NotCapturable("it waits for the device")
        self.captured.append(len(calls))
        outputs = [call() for call in calls]

        def replay():
            for output, call in zip(outputs, calls):
                pairs = zip(output, call()) if isinstance(output, tuple) else [(output, call())]
                for old, new in pairs:
                    if isinstance(old, torch.Tensor):
                        old.data.copy_(new)

        return replay, outputs

    def times(self, run, rounds):
        for _ in range(rounds):
            run()
        return [(self.captured[-1] if self.captured else 4) * 1e-6] * rounds


def accept(outputs: list) -> None:
    pass


def test_a_graph_holds_many_rotations():
    device = FakeDevice()
    timed = timing.InGraph([lambda: torch.zeros(2)] * 4, accept, device)
    assert timed.about == {"graph": True} and timed.calls == device.captured[-1] == 1000
    times = timed.measure(0.01)
    assert len(times) == 10 and times[0] == pytest.approx(1e-6)
    assert len(timed.measure(1e-9)) == timing.MIN_REPLAYS
    assert len(timed.measure(1e9)) == timing.MAX_ROUNDS


def test_without_a_graph():
    timed = timing.InGraph([lambda: torch.zeros(2)] * 4, accept, FakeDevice(capturable=False))
    assert timed.about == {"graph": False} and timed.calls == 4 and "waits" in timed.reason
    assert timed.measure(1e-4)[0] == pytest.approx(1e-6)


def test_a_replay_that_writes_nothing_is_found_out():
    class Broken(FakeDevice):
        def capture(self, calls):
            return lambda: None, super().capture(calls)[1]

    def check_finite(outputs):
        assert all(bool(out.isfinite().all()) for out in outputs)

    timing.InGraph([lambda: torch.zeros(2)], check_finite, FakeDevice())
    with pytest.raises(AssertionError):
        timing.InGraph([lambda: torch.zeros(2)], check_finite, Broken())


def test_what_a_graph_adds_is_looked_at_once():
    class Device(FakeDevice):
        def capture(self, calls):
            self.captured.append(len(calls))
            return lambda: [call() for call in calls], [call() for call in calls]

    def ones(outputs):
        assert all(bool((out == 1).all()) for out in outputs)

    y = torch.zeros(2)
    assert timing.InGraph([lambda: y.add_(1)], ones, Device(), adds=True).calls == 1000
    with pytest.raises(AssertionError):
        timing.InGraph([lambda: y.add_(1)], ones, Device())


def gpu_providers():
    """Without those that need a GPU or triton's interpreter; on a CPU all calls of multi_lora_ add to one y."""
    for case, of_case in {case.op: (case, p) for case, p in suite.entries(TINY)}.values():
        for name, provider in of_case.items():
            if name != "triton" and case.op != "multi_lora_":
                yield pytest.param(case, provider, id=f"{case.op}-{name}")


@pytest.mark.parametrize("case, provider", list(gpu_providers()))
def test_results_in_a_graph(case, provider, monkeypatch):
    """Right as they are called and as they are replayed."""
    monkeypatch.setattr(timing, "GRAPH_SECONDS", 1e-5)
    monkeypatch.setattr(providers, "MAX_COPIES", 2)
    case = dataclasses.replace(
        case, device="cpu", M=min(case.M, 8), popularity=case.popularity and "2"
    )
    calls = provider.calls(case)
    timed = timing.InGraph(calls, lambda outputs: check.verify(case, outputs), FakeDevice())
    assert timed.about == {"graph": True}


# -- a run, and its tables ---------------------------------------------------------------------------

FACTS = {
    "name": "NVIDIA Test-1 (TM)", "capability": "9.0", "multiprocessors": 132, "l2_bytes": 60 << 20,
    "driver": None, "cuda": "13.0", "architectures": ["9.0a"],
}  # fmt: skip


@pytest.fixture
def gpu_run(monkeypatch, tmp_path):
    """gpu_run(arguments): the exit and document of a run; made-up times: ours 2 µs a call, cuBLAS 4, all others 6."""
    output, written = tmp_path / "gpu.json", []

    def measure(case, of_case, seconds, passes, deadline, turn):
        if output.exists():
            written.append(json.loads(output.read_text()))
        found = {}
        for name in of_case:
            ms = {OURS: 2e-3, "torch": 4e-3}.get(name, 6e-3)
            graph = case.op != "quantize_4bit"
            found[name] = {"median_ms": ms, "q1_ms": ms, "q3_ms": ms, "rounds": 12, "graph": graph}
        if (case.op, case.M) == ("linear_4bit", 1):
            found["bitsandbytes"] = {"error": "wrong result"}
        return found

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(machine, "gpu", lambda: dict(FACTS))
    monkeypatch.setattr(harness, "measure", measure)
    rates = {"copy_gbs": 4295.0, "matmul_tflops": 733.0}
    monkeypatch.setattr(limits, "measure", lambda device, found: found.update(rates))

    def run(*arguments: str):
        with pytest.raises(SystemExit) as end:
            main.main(["--device", "cuda", "--output", str(output), *arguments])
        return end.value.code, json.loads(output.read_text()), written

    return run


def test_a_run_on_a_gpu(gpu_run, tmp_path):
    code, document, written = gpu_run("--note", "n")
    assert "bitsandbytes failed, linear_4bit 4096x4096 M=1: wrong result" in code
    assert [part["complete"] for part in written] == [False] * len(written), "after each case"
    assert len(written) == len(document["cases"]) - 1 and "complete" not in document
    assert report.machine_name(document) == "nvidia-test-1" and document["note"] == "n"
    case = next(c for c in document["cases"] if c["M"] == 4096)
    assert case["limit_ms"] == pytest.approx(case["flops"] / 733e9, rel=1e-3)

    section = " ".join(report.machine_page(document).replace("|", " | ").split())
    for words in (
        "# NVIDIA Test-1 (TM)", "**n**", "| 2* ±0% |", "vs torch + PEFT",
        "| M | lowrank_kernels | bitsandbytes | cuBLAS | dequantize + matmul | ",
        "| 4 | 2 ±0% | 6 ±0% | 4 ±0% | 6 ±0% | 6 ±0% | 3.0x | 2.0x |",
        "| 1 | 2 ±0% | failed | 4 ±0% |",
    ):  # fmt: skip
        assert words in section, words

    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    (tmp_path / "docs").mkdir()
    for path in (tmp_path / "docs/performance.md", tmp_path / "README.md"):
        path.write_text(f"{report.BEGIN}\n{report.END}\n")
    report.write_documents(tmp_path, tmp_path)
    assert "gpu-speedup.png" in (tmp_path / "docs/performance.md").read_text()
    assert "vs torch + PEFT" in (tmp_path / "docs/performance/gpu.md").read_text()
    assert (tmp_path / "README.md").read_text() == f"{report.BEGIN}\n{report.END}\n", "of CPUs"


def test_a_run_that_is_out_of_time():
    case = Case("linear_4bit", 96, 128, 5)
    of_case = {OURS: harness.Provider(providers.linear_lowrank)}
    assert harness.measure(case, of_case, 0.1, deadline=0.0) == {
        OURS: {"unavailable": "no time was left"}
    }


# -- the one command ---------------------------------------------------------------------------------

PYTHON = """#!/usr/bin/env bash
echo "$@" >>"$CALLS"
case "$*" in
    *get_device_capability*) echo 9.0a ;;
    *pytest*) echo "1 failed, 9 passed"; exit 1 ;;
    *sleeps*) sleep 60 ;;
esac
"""


def gpu_command(tmp_path, *arguments: str, **environment: str):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    calls = tmp_path / "calls"
    more = {"PYTHON": str(python), "CALLS": str(calls), "LOGS": str(tmp_path / "logs")}
    done = subprocess.run(
        [str(ROOT / "bench/gpu.sh"), *arguments],
        env=os.environ | more | environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_steps_of_the_command(tmp_path):
    """A failed test does not keep the rest from running, and the results are told of it."""
    done, calls = gpu_command(tmp_path)
    assert done.returncode == 1 and "failed: test" in done.stdout, done.stdout + done.stderr
    run = "\n".join(calls)
    assert "setup.py build_ext --inplace" in run and "-m bench.report" in run
    assert "python_tests/test_linear_4bit.py" in run and "python_tests/test_multi_lora_.py" in run
    assert "The tests before this run did not pass: 1 failed, 9 passed" in run
    assert (tmp_path / "logs/test.log").read_text() == "1 failed, 9 passed\n"
    bound = [
        int(line.split("at most ")[1].split()[0])
        for line in done.stdout.splitlines()
        if "at most" in line
    ]
    assert sum(bound) <= 540 and len(bound) >= 5


def test_chosen_steps_of_the_command(tmp_path):
    done, calls = gpu_command(tmp_path, "bench", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [call.split()[1] for call in calls if call.startswith("-m")] == ["bench"]
    assert "--quick" in calls[-1] and not any("pytest" in call for call in calls)
    assert gpu_command(tmp_path, "fly")[0].returncode == 2
