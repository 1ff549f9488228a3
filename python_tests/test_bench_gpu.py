"""The benchmarks of a GPU without one: cases, graphs, checks, tables, and the steps of ``bench.gpu``."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # `bench` is no part of the installed package

pytest.importorskip("pytest_benchmark", reason="the suite runs on pytest-benchmark")

from bench import (  # noqa: E402
    bench_linear_4bit,
    bench_linear_4bit_dx,
    bench_lora_linear_4bit,
    bench_quantize,
    gpu,
    harness,
    report,
    smoke,
    summary,
)
from bench import cases as case_lists  # noqa: E402
from bench.cases import cases  # noqa: E402
from lowrank_kernels.benchmark import check, cuda, providers  # noqa: E402
from lowrank_kernels.benchmark.case import Case  # noqa: E402

# -- cases, rotation, timing, checks ----------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch):
    """The lists of cases of a GPU; nothing of it needs one."""
    for name in ("DEVICE", "SHAPES", "TOKENS", "TRAINING_TOKENS", "DTYPES", "GROWTH_SHAPES"):
        monkeypatch.setattr(case_lists, name, getattr(case_lists, name))
    monkeypatch.setattr(cuda, "l2_bytes", lambda: 60 << 20)
    case_lists.choose("cuda")


def test_gpu_cases(on_gpu):
    linear = cases("linear_4bit", hot=(1, 4))
    assert len(linear) == 3 * 6
    assert {(c.device, c.dtype, c.cache) for c in linear} == {("cuda", "bfloat16", "cold")}
    training = cases("lora_linear_4bit_fwd_bwd", case_lists.TRAINING_TOKENS, R=16)
    assert {c.M for c in training} == {512, 4096}
    case_lists.choose("cuda", [(8, 64)], [3])
    assert [(c.N, c.K, c.M) for c in cases("linear_4bit")] == [(8, 64, 3)]


def test_gpu_weights_exceed_the_l2(on_gpu):
    for case in cases("linear_4bit"):
        for nbytes in (case.weight_bytes, 2 * case.N * case.K):
            count = providers.copies(case, nbytes)
            assert count >= 2 and count * nbytes >= 3 * (60 << 20)
    assert providers.copies(Case("linear_4bit", 28672, 8192, 1, device="cuda"), 2 << 30) == 2


class FakeDevice(cuda.Device):
    """Runs calls on the CPU, each of which "takes" a microsecond; captures if it is let to."""

    def __init__(self, capturable: bool = True):
        self.capturable, self.captured = capturable, []

    def capture(self, calls):
        if not self.capturable:
            raise cuda.NotCapturable("it waits for the device")
        self.captured.append(len(calls))
        outputs = [call() for call in calls]

        def replay():
            for output, call in zip(outputs, calls):
                if isinstance(output, torch.Tensor):
                    output.copy_(call())

        return replay, outputs

    def times(self, run, rounds):
        for _ in range(rounds):
            run()
        calls = self.captured[-1] if self.captured else 4
        return [calls * 1e-6] * rounds


def test_a_graph_holds_many_rotations():
    device = FakeDevice()
    timed = cuda.Timed([lambda: torch.zeros(2)] * 4, device=device)
    assert timed.graph and timed.calls == device.captured[-1] == 1000
    times = timed.measure(0.01)
    assert len(times) == 10 and times[0] == pytest.approx(1e-6)
    assert len(timed.measure(1e-9)) == cuda.MIN_ROUNDS
    assert len(timed.measure(1e9)) == cuda.MAX_ROUNDS


def test_without_a_graph():
    timed = cuda.Timed([lambda: torch.zeros(2)] * 4, device=FakeDevice(capturable=False))
    assert not timed.graph and timed.calls == 4
    assert "waits" in timed.reason
    assert timed.measure(1e-4)[0] == pytest.approx(1e-6)


def test_a_replay_that_writes_nothing_is_found_out():
    class Broken(FakeDevice):
        def capture(self, calls):
            return lambda: None, super().capture(calls)[1]

    def check_finite(outputs):
        assert all(bool(out.isfinite().all()) for out in outputs)

    calls = [lambda: torch.zeros(2)]
    cuda.Timed(calls, check_finite, FakeDevice())
    with pytest.raises(AssertionError):
        cuda.Timed(calls, check_finite, Broken())


def test_wrong_results_are_found_out():
    case = Case("linear_4bit", 64, 128, 5, "bfloat16", "hot")
    right = bench_linear_4bit.PROVIDERS["lowrank_kernels"](case)[0]()
    check.verify(case, [right, right])
    for wrong in (right * 1.05, right.T, right.clone().fill_(float("nan"))):
        with pytest.raises(check.Wrong):
            check.verify(case, [right, wrong])


def every_provider():
    for module in (bench_linear_4bit, bench_linear_4bit_dx, bench_quantize):
        for op in dict.fromkeys(case.op for case in module.CASES):
            yield op, module.PROVIDERS.get(op, module.PROVIDERS)
    yield "quantize_4bit", {"operators alone": providers.quantize_operators}
    for op in ("lora_linear_4bit", "lora_linear_4bit_fwd_bwd"):
        yield op, bench_lora_linear_4bit.CUDA_PROVIDERS


@pytest.mark.parametrize(
    "op, provider",
    [
        pytest.param(op, provider, id=f"{op}-{name}")
        for op, of_op in every_provider()
        for name, provider in of_op.items()
    ],
)
def test_providers_pass_the_check(op, provider):
    M, R = 0 if "quantize" in op else 5, 4 if "lora" in op else 0
    case = Case(op, 96, 128, M, "bfloat16", "hot", R)
    try:
        calls = provider(case)
    except providers.Unavailable as reason:
        pytest.skip(str(reason))
    check.verify(case, [call() for call in calls])


FAKE_RUN = """
import sys, torch
sys.path.insert(0, "python_tests")
from test_bench_gpu import FakeDevice
from bench import __main__ as main, cases
from lowrank_kernels.benchmark import case, cuda, providers
for name in [name for name in sys.modules if name.startswith("bench.bench_")]:
    del sys.modules[name]  # they listed the CPU's cases
real = cases.Case
cases.Case = case.Case = lambda *fields: real(*fields[:7])  # on the CPU, whatever cases.DEVICE says
torch.cuda.is_available = lambda: True
cuda.Device, cuda.GRAPH_SECONDS, cuda.WARM_SECONDS = FakeDevice, 1e-5, 1e-6
providers.MAX_COPIES = 2
cuda.LIMITS = dict.fromkeys(cuda.LIMITS, lambda: lambda: None)
cuda.facts = lambda: {"name": "Fake GPU 9", "architectures": None}
cuda.state = lambda: {"sm_mhz": 1000.0}
right = providers.linear_dequantize
providers.linear_dequantize = lambda case: [lambda: 2 * right(case)[0]()]
main.main(sys.argv[1:])
"""


def fake_run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", FAKE_RUN, "--device", "cuda", *arguments]
    command += ["--shape", "96x128", "--tokens", "5", "--seconds", "1e-6"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_run_on_a_gpu(tmp_path):
    """From the command line to the JSON, with a wrong provider; only the device is not real."""
    output = tmp_path / "fake.json"
    done = fake_run(
        "--op", "linear_4bit", "--op", "quantize", "--note", "n", "--output", str(output)
    )
    document = json.loads(output.read_text())
    assert done.returncode == 1 and "relative error" in done.stderr, done.stderr
    assert "complete" not in document and document["note"] == "n"
    assert len(document["gpu"]["states"]) == 4
    assert set(document["limits"]) == {"copy_gbs", "write_gbs", "matmul_tflops"}
    linear, *others = document["cases"]
    assert {case["op"] for case in others} == {"quantize_4bit", "dequantize_4bit"}
    assert "wrong result" in linear["providers"]["dequantize + matmul"]["error"]
    ours = linear["providers"]["lowrank_kernels"]
    assert ours["graph"] is True and ours["rounds"] >= 4 * cuda.MIN_ROUNDS
    assert "failed before" not in json.dumps(document)


def test_a_run_that_is_out_of_time(tmp_path):
    output = tmp_path / "fake.json"
    done = fake_run("--op", "linear_4bit", "--budget", "1e-9", "--output", str(output))
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(output.read_text())["cases"]
    assert case["providers"]["torch"] == {"unavailable": "no time was left"}


# -- tables -----------------------------------------------------------------------------------


@pytest.fixture
def gpu_document(on_gpu, monkeypatch) -> dict:
    """Made-up numbers of every case: ours 2 µs a call, cuBLAS 4, all others 6."""
    facts = {
        "name": "NVIDIA Test-1 (TM)", "capability": "9.0", "multiprocessors": 132,
        "l2_bytes": 60 << 20, "memory_bytes": 1 << 37, "driver": None, "cuda": "13.0",
        "architectures": ["9.0a"], "plan": None,
    }  # fmt: skip
    monkeypatch.setattr(cuda, "facts", lambda: facts)
    run = harness.Harness()
    run.limits = {"copy": 1e-3, "write": 0.5e-3, "matmul": 1.5e-3}
    run.states = [{"sm_mhz": 1980.0}, {"sm_mhz": 1700.0}]
    lora = bench_lora_linear_4bit.CUDA_PROVIDERS
    lists = [
        ("linear_4bit", None, bench_linear_4bit.PROVIDERS),
        ("linear_4bit_dx", None, bench_linear_4bit_dx.PROVIDERS),
        ("lora_linear_4bit", None, lora),
        ("lora_linear_4bit_fwd_bwd", case_lists.TRAINING_TOKENS, lora),
        ("quantize_4bit", (0,), bench_quantize.PROVIDERS["quantize_4bit"]),
        ("dequantize_4bit", (0,), bench_quantize.PROVIDERS["dequantize_4bit"]),
    ]
    for op, tokens, of_op in lists:
        for case in cases(op, tokens, R=16 if "lora" in op else 0):
            for name in of_op:
                seconds = {"lowrank_kernels": 2e-6, "torch": 4e-6}.get(name, 6e-6)
                run.seconds[case, name] = [seconds] * 12
                run.graphs[case, name] = op != "quantize_4bit"
    first = next(iter(run.seconds))[0]
    run.errors[first, "bitsandbytes"] = "wrong result"
    return json.loads(json.dumps(harness.collect({"benchmarks": []}, run)))


def test_gpu_document(gpu_document):
    assert report.machine_name(gpu_document) == "nvidia-test-1"
    assert gpu_document["limits"]["copy_gbs"] == pytest.approx(4295, rel=1e-3)
    assert gpu_document["limits"]["matmul_tflops"] == pytest.approx(733, rel=1e-3)
    case = next(c for c in gpu_document["cases"] if c["M"] == 4096)
    assert case["limit_ms"] == pytest.approx(case["flops"] / 733e9, rel=1e-3)


def test_gpu_tables(gpu_document):
    section = report.machine_section(gpu_document, None)
    assert "## NVIDIA Test-1 (TM)" in section and "1700 to 1980 MHz" in section
    head = "| M | lowrank_kernels | bitsandbytes | cuBLAS | dequantize + matmul | "
    assert head + "vs bitsandbytes | vs cuBLAS | of limit |" in section
    assert "| 4 | 2 ±0% | 6 ±0% | 4 ±0% | 6 ±0% | 3.0x | 2.0x |" in section
    assert "| 1 | 2 ±0% | failed | 4 ±0% |" in section
    assert "bitsandbytes failed, linear_4bit 4096x4096 M=1: wrong result" in section
    assert "GB/s written" in section and "| 2* ±0% |" in section
    assert "vs Unsloth's scheme" in section
    assert report.TITLES["quantize_4bit"] in report.text(gpu_document)


def test_gpu_documents_beside_those_of_cpus(gpu_document, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    docs.mkdir()
    for path in (docs / "performance.md", tmp_path / "README.md"):
        path.write_text(f"{report.BEGIN}\n{report.END}\n")
    (results / "gpu.json").write_text(json.dumps(gpu_document))
    report.write_documents(results, tmp_path)
    assert "Test-1" in (docs / "performance.md").read_text()
    assert (tmp_path / "README.md").read_text() == f"{report.BEGIN}\n{report.END}\n"
    (of_a_cpu, *_) = (ROOT / "bench" / "results").glob("intel*.json")
    (results / "cpu.json").write_text(of_a_cpu.read_text())
    report.write_documents(results, tmp_path)
    assert "float32 arithmetic" in (tmp_path / "README.md").read_text()
    assert "## NVIDIA Test-1" in (docs / "performance.md").read_text()


def test_gpu_summary(gpu_document):
    text = summary.text(gpu_document)
    assert len(text) < 8000 and max(map(len, text.splitlines())) <= 160
    assert "adapter over base" in text and "+0%" in text
    assert "bitsandbytes failed" in text
    row = next(line.split() for line in text.splitlines() if line.split()[:1] == ["4"])
    assert row[1:4] == ["2", "2.0x", "3.0x"]
    gpu_document["cases"] = gpu_document["cases"][:1]
    gpu_document["complete"] = False
    assert "CUT SHORT" in summary.text(gpu_document)


# -- the one command --------------------------------------------------------------------------


def python(code: str, seconds: float = 20, **more) -> gpu.Command:
    return gpu.Command([sys.executable, "-c", code], seconds, **more)


def step(name: str, *commands: gpu.Command, needs: str | None = None, seconds=20.0) -> gpu.Step:
    return gpu.Step(name, seconds, 1, lambda _: list(commands), needs)


@pytest.fixture
def log(tmp_path) -> gpu.Log:
    return gpu.Log(tmp_path / "gpu.log")


def test_time_is_shared_out():
    build, test, bench_step = (
        gpu.Step(name, seconds, least, list)
        for name, seconds, least in (("build", 180, 60), ("test", 180, 60), ("bench", 240, 120))
    )
    assert gpu.allowed(build, [test, bench_step], 530) == 180
    assert gpu.allowed(build, [test, bench_step], 300) == 120
    assert gpu.allowed(test, [bench_step], 200) == 80
    assert gpu.allowed(bench_step, [], 400) == 240
    assert gpu.allowed(bench_step, [], 10) == 120, "its least, even late"
    for known in (gpu.known_steps({}, False, {}), gpu.known_steps({}, True, {})):
        assert sum(s.least for s in known) + 60 < gpu.TOTAL_SECONDS < 540


def test_a_command_that_hangs_is_killed(log, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.5)
    command = gpu.Command(["sh", "-c", "trap '' INT; echo on; sleep 300"], 3)
    result = gpu.execute(command, 3, log)
    assert result.status == "timed out" and result.seconds < 200
    assert result.output == log.path.read_text() == "on\n"


def test_steps_after_a_failure(log):
    results = {}
    steps = [
        step("build", python("import sys; print('error: no'); sys.exit(3)"), python("print('X')")),
        step("bench", python("print('Y')"), needs="build"),
        step("sanitize", python("1/0"), python("print('Z')", anyway=True)),
        step("facts", python("1/0", required=False), python("print('fine')")),
        gpu.Step("none", 1, 1, lambda _: "no tool"),
    ]
    gpu.run_steps(steps, log, 100, results)
    status = {name: result.status for name, result in results.items()}
    assert status == {
        "build": "failed", "bench": "skipped", "sanitize": "failed", "facts": "ok", "none": "skipped"
    }  # fmt: skip
    text = log.path.read_text()
    assert "Z\n" in text and "fine\n" in text and "X\n" not in text and "Y\n" not in text
    assert gpu.finish(results, None, log) == 1
    assert "build: error: no" in log.path.read_text()
    assert gpu.finish({"facts": results["facts"]}, None, log) == 0


def test_the_summary_comes_last(log, gpu_document):
    gpu.finish({"bench": gpu.Result("ok", 1.0, "")}, gpu_document, log)
    assert log.path.read_text().endswith(summary.text(gpu_document) + "\n")


def test_commands_of_the_steps():
    assert gpu.architecture([9, 0]) == "9.0a" and gpu.architecture([10, 0]) == "10.0"
    (build,) = gpu.build_commands(100, {"capability": [9, 0]})
    assert build.env["TORCH_CUDA_ARCH_LIST"] == "9.0a" and build.env["LOWRANK_BUILD_CUDA"] == "1"
    (tests,) = gpu.test_commands(100)
    assert tests.env == {"LOWRANK_TEST_DEVICE": "cuda"}
    assert "python_tests/test_linear_4bit.py" in tests.argv
    results = {"test": gpu.Result("failed", 1.0, ".F\n=== 1 failed, 9 passed in 3.2s ===\n")}
    note = gpu.note_of(results)
    assert "1 failed, 9 passed" in note
    measure, write = gpu.bench_commands(200, quick=False, note=note)
    assert measure.argv[-1] == note and measure.seconds + write.seconds == 200
    assert float(measure.argv[measure.argv.index("--budget") + 1]) < measure.seconds - 20
    assert write.anyway
    assert len(gpu.bench_commands(200, quick=True, note=None)) == 1
    assert gpu.note_of({}) is None
    assert gpu.result_file("NVIDIA H200", True).name == "nvidia-h200.json"


def test_arguments_of_the_command():
    assert gpu.parse(["--only", "bench,build"]).only == ["build", "bench"]
    assert gpu.parse([]).only == ["build", "test", "sanitize", "bench"]
    with pytest.raises(SystemExit):
        gpu.parse(["--only", "fly"])


def test_smoke():
    assert smoke.run("cpu") == 90
