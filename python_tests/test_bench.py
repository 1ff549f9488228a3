"""The benchmark suite on tiny sizes: valid results, correct limits, providers that compute the same."""

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
    harness,
    providers,
    report,
)
from bench.cases import Case, cases  # noqa: E402

PEERS = {"bitsandbytes", "bitsandbytes + PEFT", "torch + PEFT"}


def bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[dict, str]:
    """The document and the printed tables of one tiny run."""
    output = tmp_path_factory.mktemp("bench") / "tiny.json"
    sizes = (
        "--threads",
        "1",
        "--shape",
        "96x128",
        "--tokens",
        "1",
        "--tokens",
        "17",
        "--seconds",
        "0.01",
    )
    done = bench("--quick", *sizes, "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text()), done.stdout


def test_document(run):
    document, _ = run
    assert document["schema"] == harness.SCHEMA
    assert document["threads"] >= 1
    assert document["versions"]["torch"] == torch.__version__ or document["versions"]["torch"]
    assert document["cpu"]["model"]
    assert document["limits"]["read_gbs"] > 0.1
    assert document["limits"]["sgemm_gflops"] > 0.1
    for case in document["cases"]:
        assert case["limit_ms"] > 0
        assert "median_ms" in case["providers"]["lowrank_kernels"], case
        for result in case["providers"].values():
            if "unavailable" in result:
                assert result["unavailable"]
            else:
                assert 0 < result["q1_ms"] <= result["median_ms"] <= result["q3_ms"]
                assert result["rounds"] >= 3


def test_every_operator_is_covered(run):
    document, _ = run
    ops = {case["op"] for case in document["cases"]}
    assert ops == set(report.TITLES)
    for op in ops - {"quantize_4bit", "dequantize_4bit"}:
        of_op = [c for c in document["cases"] if c["op"] == op and c["cache"] == "cold"]
        assert {(c["M"], c["dtype"]) for c in of_op} == {
            (M, dtype) for M in (1, 17) for dtype in ("float32", "bfloat16")
        }


def test_tables(run):
    document, printed = run
    for title in report.TITLES.values():
        assert title in printed
    assert report.text(document) in printed


def test_documents(run, tmp_path):
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    docs.mkdir()
    (results / "tiny.json").write_text(json.dumps(run[0]))
    page = docs / "performance.md"
    page.write_text(f"by hand\n{report.BEGIN}\nstale numbers\n{report.END}\nalso by hand\n")
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    done = report.write_documents(results, tmp_path)
    assert (results / "tiny.png").read_bytes().startswith(b"\x89PNG")
    assert any("skipped" in line and "README.md" in line for line in done)
    text = page.read_text()
    assert text.startswith("by hand\n") and text.endswith("\nalso by hand\n")
    assert "stale numbers" not in text
    assert "| M | lowrank_kernels |" in text
    (tmp_path / "README.md").write_text(f"# x\n{report.BEGIN}\n{report.END}\n")
    report.write_documents(results, tmp_path)
    assert "LoRA training" in (tmp_path / "README.md").read_text()
    assert page.read_text() == text, "a second run changes nothing"


def test_missing_peers_are_named(run):
    document = json.loads(json.dumps(run[0]))
    for case in document["cases"]:
        for name in PEERS & set(case["providers"]):
            case["providers"][name] = {"unavailable": "not installed"}
    assert "bitsandbytes did not run: not installed" in report.text(document)
    assert "| - |" in report.machine_section(document, None)
    report.readme_section(document)


def test_no_results(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    with pytest.raises(FileNotFoundError, match="python -m bench"):
        report.write_documents(tmp_path, tmp_path)


@pytest.mark.parametrize(
    "arguments", [["--threads", "0"], ["--op", "none"], ["--shape", "4096"], ["--tokens", "0"]]
)
def test_wrong_arguments(arguments):
    from bench.__main__ import parse

    with pytest.raises(SystemExit) as error:
        parse(arguments)
    assert error.value.code == 2


# -- what is counted ---------------------------------------------------------------------------------


def test_limits():
    case = Case("linear_4bit", 4096, 4096, 16)
    assert case.flops == 2 * 16 * 4096 * 4096
    assert case.weight_bytes == 4096 * 4096 // 2 + 4096 * 64 + 4 * 1024
    assert case.bytes == case.weight_bytes + 2 * 16 * 4096 * 4
    # arithmetic: 0.537 GFLOP at 256 GFLOP/s; memory: 9.2 MB at 22 GB/s
    assert case.limit_seconds(22.0, 256.0) == pytest.approx(2.097e-3, rel=1e-3)
    assert Case("linear_4bit", 4096, 4096, 1).limit_seconds(22.0, 256.0) == pytest.approx(
        0.395e-3, rel=1e-2
    )


def test_training_costs_three_adapter_passes_and_two_base_passes():
    forward = Case("lora_linear_4bit", 64, 128, 8, R=16)
    both = Case("lora_linear_4bit_fwd_bwd", 64, 128, 8, R=16)
    base, adapter = 2 * 8 * 64 * 128, 2 * 8 * 16 * (64 + 128)
    assert forward.flops == base + adapter
    assert both.flops == 2 * base + 3 * adapter


def test_cold_weights_exceed_the_cache():
    from lowrank_kernels.cli import machine

    case = Case("linear_4bit", 4096, 4096, 1)
    count = providers.copies(case, case.weight_bytes)
    assert (count - 1) * case.weight_bytes >= 2 * machine.last_level_cache_bytes()
    assert providers.copies(Case("linear_4bit", 4096, 4096, 1, cache="hot"), 1) == 1


def test_copies_have_their_own_memory():
    case = Case("linear_4bit", 64, 2048, 1)
    weights = providers.weights_4bit(case)[:3]
    assert len({w.packed.data_ptr() for w in weights}) == len(weights) > 1
    assert weights[0].nbytes >= case.weight_bytes


# -- the providers of an operator compute the same ---------------------------------------------------


def modules():
    for module in (bench_linear_4bit, bench_linear_4bit_dx, bench_lora_linear_4bit):
        for op in dict.fromkeys(case.op for case in module.CASES):
            for name in module.PROVIDERS:
                yield pytest.param(op, module.PROVIDERS, name, id=f"{op}-{name}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op, of_op, name", list(modules()))
def test_providers_agree(op, of_op, name, dtype):
    case = Case(op, 96, 128, 5, dtype, "hot", R=4 if "lora" in op else 0)
    try:
        got = of_op[name](case)[0]()
    except providers.Unavailable as reason:
        pytest.skip(str(reason))
    expected = of_op["dequantize + matmul"](case)[0]()
    if not isinstance(got, tuple):
        got, expected = (got,), (expected,)
    tolerance = 0.03 if dtype == "bfloat16" else 1e-5
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert (a.float() - b.float()).norm() <= tolerance * b.float().norm()


def test_cases_keep_shapes_together():
    shapes = [(case.N, case.K) for case in cases("linear_4bit", hot=(1,))]
    assert shapes == sorted(shapes, key=shapes.index)
