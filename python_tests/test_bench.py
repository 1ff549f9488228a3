"""The benchmark suite on tiny sizes: valid results, correct limits, providers that compute the same."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import lowrank_kernels as lk

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # `bench` is no part of the installed package

pytest.importorskip("pytest_benchmark", reason="the suite runs on pytest-benchmark")

from bench import (  # noqa: E402
    bench_linear_4bit,
    bench_linear_4bit_dx,
    bench_lora_linear_4bit,
    bench_multi_lora,
    harness,
    report,
    report_cpu,
    report_multi,
)
from bench.cases import cases  # noqa: E402
from bench.tables import INT8  # noqa: E402
from lowrank_kernels.benchmark import check, cuda, multi_providers, providers  # noqa: E402
from lowrank_kernels.benchmark.case import Case, rows_per_adapter  # noqa: E402

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
    assert ("sgemm_avx2_gflops" in document["limits"]) == ("avx2" in lk.backends.isas()[1:])
    assert len(document["memory"]["extra"]["linear_4bit"]) == 2
    for case in document["cases"]:
        assert case["limit_ms"] > 0
        assert "median_ms" in case["providers"]["lowrank_kernels"], case
        for result in case["providers"].values():
            if "unavailable" in result:
                assert result["unavailable"]
            else:
                assert 0 < result["q1_ms"] <= result["median_ms"] <= result["q3_ms"]
                assert result["rounds"] >= 3 and result["copies"] >= 1


def test_every_operator_is_covered(run):
    document, _ = run
    ops = {case["op"] for case in document["cases"]}
    assert ops == {*report.TITLES, *report_multi.TITLES, report_cpu.GROWTH}
    for op in report.TITLES.keys() - {"quantize_4bit", "dequantize_4bit"}:
        of_op = [c for c in document["cases"] if c["op"] == op and c["cache"] == "cold"]
        assert {(c["M"], c["dtype"]) for c in of_op} == {
            (M, dtype) for M in (1, 17) for dtype in ("float32", "bfloat16")
        }


def test_tables(run):
    document, printed = run
    titles = (report.TITLES, report_multi.TITLES, report_cpu.TITLES)
    for title in (title for of_module in titles for title in of_module.values()):
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
    for name in ("speedup", "limit", "growth"):
        assert (docs / "benchmarks" / f"tiny-{name}.png").read_bytes().startswith(b"\x89PNG")
    assert any("skipped" in line and "README.md" in line for line in done)
    text = page.read_text()
    assert text.startswith("by hand\n") and text.endswith("\nalso by hand\n")
    assert "stale numbers" not in text
    assert "| M | lowrank_kernels |" in text
    assert text.count("(benchmarks/tiny-") == 3
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
    assert (count - 1) * case.weight_bytes >= 1.25 * machine.last_level_cache_bytes()
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
            of_op = module.PROVIDERS | getattr(module, "FLOAT32_PROVIDERS", {})
            for name in of_op:
                if name.startswith("ggml"):  # other values: test_bench_peers.py
                    continue
                yield pytest.param(op, of_op, name, id=f"{op}-{name}")


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
    # On a CPU with bfloat16 units bitsandbytes multiplies in bfloat16, whatever x is.
    rounded = dtype == "bfloat16" or (op, name) == ("linear_4bit", "bitsandbytes") or name == INT8
    tolerance = 0.03 if rounded else 1e-5
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert (a.float() - b.float()).norm() <= tolerance * b.float().norm()


def test_cases_keep_shapes_together():
    shapes = [(case.N, case.K) for case in cases("linear_4bit", hot=(1,))]
    assert shapes == sorted(shapes, key=shapes.index)


# -- many adapters in one batch ----------------------------------------------------------------------


def many(
    op: str, M: int, popularity: str, mixed: bool = False, dtype="float32", cache="cold"
) -> Case:
    return Case(op, 96, 128, M, dtype, cache, 64 if mixed else 4, "cpu", popularity, mixed)


def test_rows_per_adapter():
    """Punica's definitions, by hand."""
    assert rows_per_adapter(16, "identical") == [16]
    assert rows_per_adapter(3, "distinct") == [1, 1, 1]
    assert rows_per_adapter(64, "uniform") == [8] * 8
    assert rows_per_adapter(7, "uniform") == [3, 2, 2]
    assert rows_per_adapter(64, "zipf") == [17, 17, 11, 7, 5, 3, 2, 1, 1]
    assert rows_per_adapter(512, "4") == [128] * 4
    for popularity in report_multi.POPULARITIES:
        for M in range(1, 70):
            rows = rows_per_adapter(M, popularity)
            assert sum(rows) == M and min(rows) > 0 and rows == sorted(rows, reverse=True)


def test_what_many_adapters_cost():
    """Each adapter of the batch is read once, at its own rank; y is read and written."""
    case = many("multi_lora_", 6, "distinct", mixed=True)
    ranks = [8, 16, 32, 64, 8, 16]
    assert case.ranks == ranks
    assert case.flops == 2 * sum(ranks) * (96 + 128)
    assert case.bytes == 4 * (sum(ranks) * (96 + 128) + 6 * (128 + 2 * 96))
    zipf = many("multi_lora_linear_4bit", 5, "zipf", dtype="bfloat16")
    assert zipf.flops == 2 * 5 * 96 * 128 + 2 * 5 * 4 * (96 + 128)
    adapters = len(rows_per_adapter(5, "zipf"))
    assert zipf.bytes == zipf.weight_bytes + 2 * (adapters * 4 + 5) * (96 + 128)
    training = many("multi_lora_linear_4bit_fwd_bwd", 6, "2")
    assert training.flops == 2 * 2 * 6 * 96 * 128 + 3 * 2 * 6 * 4 * (96 + 128)


def test_cases_of_many_adapters():
    ids = [case.id for case in bench_multi_lora.CASES]
    assert len(set(ids)) == len(ids) == 22
    grid = [case for case in bench_multi_lora.CASES if (case.N, case.K) == (11008, 4096)]
    assert {(case.M, case.popularity) for case in grid} == {
        (1, "identical"),
        *((M, popularity) for M in (4, 16, 64) for popularity in report_multi.POPULARITIES),
    }


def test_batches_of_few_adapters_are_cold_too(monkeypatch):
    """All that the calls of a case read exceeds the cache, and no call reads what another one does."""
    monkeypatch.setattr(providers.machine, "last_level_cache_bytes", lambda: 1 << 20)
    for case in (many("multi_lora_", 1, "identical"), many("multi_lora_", 9, "uniform")):
        pages = []
        for call in multi_providers.many_lowrank(case):
            plan, module = call.args[2:]
            pages += [(module.name, page) for s in plan.slots for page in module.bank.pool.pages(s)]
        assert len(set(pages)) == len(pages)
        assert len(pages) * 4 * (96 + 128) * 4 > 1.25 * (1 << 20)


def many_providers():
    outside = bench_multi_lora.IN_PLACE | bench_multi_lora.PADDED
    for op, of_op in bench_multi_lora.PROVIDERS.items():
        for name in of_op | (outside if op == "multi_lora_" else {}):
            yield pytest.param(op, (of_op | outside)[name], id=f"{op}-{name}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("M, popularity, mixed", [(7, "zipf", False), (6, "distinct", True)])
@pytest.mark.parametrize("op, provider", list(many_providers()))
def test_providers_of_many_adapters(op, provider, M, popularity, mixed, dtype, monkeypatch):
    """Every call of every provider gives what its own adapters make of the rows."""
    monkeypatch.setattr(providers, "MAX_COPIES", 2)
    monkeypatch.setattr(check, "TOLERANCE", 0.02 if dtype == "bfloat16" else 2e-6)
    case = many(op, M, popularity, mixed, dtype)
    outputs = []
    for call in provider(case):
        output = call()
        outputs.append(output if isinstance(output, tuple) else output.clone())
        if op == "multi_lora_":  # on a CPU all calls add to one y
            output.zero_()
    assert len(outputs) == 2 * case.groups
    check.verify(case, outputs)
    if case.groups > 1:
        with pytest.raises(check.Wrong):
            check.verify(case, outputs[1:])


def test_providers_by_case():
    def names(case):
        return set(bench_multi_lora.providers_of(case))

    grid, target, *_, mixed = (
        bench_multi_lora.many("multi_lora_", shape, 64, popularity)
        for shape, popularity in (
            ((11008, 4096), "distinct"), ((4096, 4096), "distinct"), ((4096, 4096), "mixed"),
        )
    )  # fmt: skip
    assert names(target) - names(grid) == {"torch loop, addmm_"}
    assert names(mixed) - names(target) == {"padded to 64"}


VLLM_TRITON = """
import sys
sys.path.insert(0, "python_tests")
from test_bench import check, many, multi_providers
for case in (
    many("multi_lora_", 5, "zipf", dtype="float16", cache="hot"),
    many("multi_lora_", 6, "distinct", mixed=True, cache="hot"),
    many("multi_lora_", 130, "2", dtype="float16", cache="hot"),
):
    check.verify(case, [call() for call in multi_providers.many_vllm_triton(case)])
"""


def test_the_triton_scheme():
    pytest.importorskip("triton", reason="needs triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", VLLM_TRITON],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_what_a_graph_adds_is_looked_at_once():
    from test_bench_gpu import FakeDevice

    y = torch.zeros(2)

    class Device(FakeDevice):
        def capture(self, calls):
            self.captured.append(len(calls))
            outputs = [call() for call in calls]
            return lambda: [call() for call in calls], outputs

    def ones(outputs):
        assert all(bool((out == 1).all()) for out in outputs)

    assert cuda.Timed([lambda: y.add_(1)], ones, Device(), adds=True).calls == 1000
    with pytest.raises(AssertionError):
        cuda.Timed([lambda: y.add_(1)], ones, Device())


OWN_MEMORY = """
from lowrank_kernels.benchmark import multi_providers
case.POOL = 4
multi_providers.each = lambda case, activations, turns: [(activations.clone(), t) for t in turns]
"""


def test_a_run_of_many_adapters_on_a_gpu(tmp_path):
    """Like test_a_run_on_a_gpu: only the device is not real; no Triton kernel can run then."""
    from test_bench_gpu import FAKE_RUN

    output = tmp_path / "fake.json"
    code = "import sys\nsys.modules['triton'] = None\n" + FAKE_RUN
    for line, changed in {
        "real(*fields[:7])": "real(*fields[:7], 'cpu', *fields[8:])",
        "main.main(": OWN_MEMORY + "main.main(",
    }.items():
        assert line in code
        code = code.replace(line, changed)
    done = subprocess.run(
        [sys.executable, "-c", code, "--device", "cuda", "--op", "multi_lora", "--shape", "96x128"]
        + ["-k", "not fwd_bwd", "--tokens", "5", "--seconds", "1e-6", "--output", str(output)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(output.read_text())
    ops = {case["op"] for case in document["cases"]}
    assert ops == {report_multi.ADD, report_multi.LINEAR}  # FakeDevice replays single results only
    for case in document["cases"]:
        for name, result in case["providers"].items():
            assert ("median_ms" in result) == (name != "vLLM's scheme"), (name, result)


@pytest.fixture
def many_document() -> dict:
    """Made-up milliseconds of every case: ours 1, or 0.5 where ranks are mixed, all others 4."""
    run = harness.Harness()
    run.limits = {"read": 20e-3, "sgemm": 80e-3}
    raw = {"benchmarks": []}
    for case in bench_multi_lora.CASES:
        for name in bench_multi_lora.providers_of(case):
            ours = 0.5e-3 if case.mixed else 1e-3
            raw["benchmarks"].append(
                {
                    "extra_info": {"case": vars(case), "provider": name},
                    "stats": {"data": [ours if name == "lowrank_kernels" else 4e-3] * 5},
                }
            )
    return json.loads(json.dumps(harness.collect(raw, run)))


def test_targets(many_document):
    """From the document alone: ratios, what the machine allows at most, and whether that was met."""
    head, *rows = report_multi.targets(many_document)
    assert [len(row) for row in rows] == [len(head)] * 10
    of = {(row[0], row[1]): row[2:] for row in rows}
    decode, mixed = "decode, 64 rows, 64 adapters", "decode, 64 rows, ranks 8 to 64"
    assert of[decode, "torch loop"][::3] == ["4x", "met"], "four times is enough"
    assert of[decode, "vLLM's CPU scheme"][:2] == ["5x", "4.00x"]
    assert of[decode, "vLLM's CPU scheme"][-1] == "not met"
    assert of[mixed, "padded to 64"][:2] == ["2x", "8.00x"]
    case = next(c for c in many_document["cases"] if report_multi._case_of(
        {"cases": [c]}, report_multi.TARGETS[0]))  # fmt: skip
    limit = (64 * 16 * 8192 + 64 * 3 * 4096) * 4 / many_document["limits"]["read_gbs"] / 1e6
    assert case["limit_ms"] == pytest.approx(limit)
    assert of[decode, "torch loop"][2] == f"{4 / limit:.2f}x"
    assert of[decode, "limit of the machine"] == ["65%", f"{limit:.0%}", "100%", "met"]
    many_document["cases"].remove(case)
    assert report_multi.targets(many_document)[1][3:] == ["-", "-", "not measured"]


def test_tables_of_many_adapters(many_document):
    _, *rows = report_multi.grid(many_document)
    assert [row[0] for row in rows] == ["1", "4", "16", "64"]
    assert rows[0][1:] == ["1 (4.0x, 4.0x, 4.0x)", "-", "-", "-"]
    assert rows[3][1:] == ["1 (4.0x, 4.0x, 4.0x)"] * 4
    section = report.machine_section(many_document, None)
    assert "| decode, 64 rows, ranks 8 to 64 | padded to 64 | 2x | 8.00x |" in section
    assert "times faster than torch loop, gather + bmm, vLLM's CPU scheme" in section
    mixed = next(line for line in section.splitlines() if "distinct, mixed ranks" in line)
    assert "| 0.5 ±0% | 4 ±0% |" in mixed
    assert section.count("\n| 4096 x 4096 |") == 9
    assert report_multi.section({"cases": []}) == report_multi.text({"cases": []}) == []
