"""What only a CPU's benchmarks have: variants, AVX2's limit, memory, growth, and the targets' verdicts."""

from __future__ import annotations

import contextlib
import json
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
    bench_growth,
    bench_linear_4bit,
    bench_linear_4bit_dx,
    bench_lora_linear_4bit,
    limits,
    memory,
    report,
    report_cpu,
    report_targets,
    variants,
)
from bench.cases import cases, growth_shapes  # noqa: E402
from bench.tables import INT8, OURS, is_variant  # noqa: E402
from lowrank_kernels.benchmark import check, providers  # noqa: E402
from lowrank_kernels.benchmark.case import Case  # noqa: E402

# -- variants ----------------------------------------------------------------------------------------


def of_case(case: Case) -> dict:
    modules = {
        "linear_4bit": bench_linear_4bit,
        "linear_4bit_dx": bench_linear_4bit_dx,
        "lora_linear_4bit": bench_lora_linear_4bit,
    }
    return {n: p for n, p in modules[case.op].providers_of(case).items() if is_variant(n)}


@pytest.mark.parametrize("op", ["linear_4bit", "linear_4bit_dx"])
def test_variants_compute_the_same(op):
    case = Case(op, 96, 128, 5)
    found = of_case(case)
    others = set(lk.backends.isas()) - {lk.backends.isa()}
    threads = {f"{n} thread" for n in (1,) if torch.get_num_threads() > 1}
    assert {"bfloat16", "float16", *others, *threads} <= {n.partition(", ")[2] for n in found}
    for name, provider in found.items():
        output = provider(case)[0]()
        assert str(output.dtype).endswith("16") == (name.endswith("16")), name
        check.verify(case, [output])


def test_variants_run_in_their_context(monkeypatch):
    """The ISA and the threads are what the name says while a call runs, and only then."""
    seen = []
    state = (lk.backends.isa(), torch.get_num_threads())

    def provider(case):
        return [lambda: seen.append((lk.backends.isa(), torch.get_num_threads()))]

    monkeypatch.setattr(torch, "get_num_threads", lambda real=torch.get_num_threads: max(2, real()))
    found = variants.of_linear(Case("linear_4bit", 96, 128, 1), provider)
    monkeypatch.undo()
    for name in ("scalar", "1 thread"):
        for call in found[variants.named(name)](None):
            call()
        assert (lk.backends.isa(), torch.get_num_threads()) == state
    assert seen[0][0] == "scalar" and seen[1][1] == 1


def test_where_variants_are():
    """With cold caches in float32; scalar only where a call takes no seconds; the adapter's cost."""
    assert not of_case(Case("linear_4bit", 96, 128, 1, cache="hot"))
    assert not of_case(Case("linear_4bit_dx", 96, 128, 1, "bfloat16"))
    assert variants.named("scalar") not in of_case(Case("linear_4bit", 96, 128, 64))
    lora = Case("lora_linear_4bit", 96, 128, 5, R=4)
    ((name, provider),) = of_case(lora).items()
    assert name == variants.BASE
    check.verify(Case("linear_4bit", 96, 128, 5), [provider(lora)[0]()])
    assert [variants.counts_below(n) for n in (1, 2, 6, 8)] == [[], [1], [1, 2, 4], [1, 2, 4]]


def test_int8_activations(monkeypatch):
    case = Case("linear_4bit", 96, 128, 5, cache="hot")
    monkeypatch.delattr(lk, "int8_activations", raising=False)
    with pytest.raises(providers.Unavailable, match="no int8_activations"):
        variants.linear_int8(case)
    entered = []

    @contextlib.contextmanager
    def context():
        entered.append(True)
        yield

    monkeypatch.setattr(lk, "int8_activations", context, raising=False)
    (call,) = variants.linear_int8(case)
    call()
    assert len(entered) == 2, "once when checked, once when called"

    def refuse():
        raise RuntimeError("needs VNNI")

    monkeypatch.setattr(lk, "int8_activations", refuse)
    with pytest.raises(providers.Unavailable, match="needs VNNI"):
        variants.linear_int8(case)


# -- limits, memory, growth --------------------------------------------------------------------------


def test_limit_of_avx2(monkeypatch):
    monkeypatch.setattr(limits, "SGEMM_SIZE", 64)
    seconds = {"read": 0.5, "sgemm": 1e-6, limits.AVX2: 2e-6}
    found = limits.limits_of(seconds)
    assert found["read_gbs"] == pytest.approx(limits.READ_BYTES / 0.5e9)
    assert found["sgemm_gflops"] == pytest.approx(2 * found["sgemm_avx2_gflops"])
    assert "sgemm_avx2_gflops" not in limits.limits_of({"read": 0.5, "sgemm": 1e-6})


# Without huge pages, of which a few would hold everything.
KEEP = """
import ctypes, resource, torch
PR_SET_THP_DISABLE = 41
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
from lowrank_kernels.benchmark import timing
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def of_one():
    before = faults()
    torch.ones(16 << 20)
    return faults() - before
def of_ten():  # small ones may have taken a bit of the block that was freed
    return min(of_one() for _ in range(10))
print(of_ten(), timing.keep_freed_memory(), of_ten())
"""


def test_freed_memory_is_kept():
    """A large tensor gets the pages of the one before, which by default it does not."""
    done = subprocess.run([sys.executable, "-c", KEEP], cwd=ROOT, capture_output=True, text=True)
    before, kept, after = done.stdout.split()
    if kept == "False":
        pytest.skip("this system's malloc is not glibc's")
    assert int(after) < 1000 < int(before)


def test_memory(monkeypatch):
    """Small where nothing of the size of the weight is made; the control shows that it would be seen."""
    if not memory.RESET.exists():
        pytest.skip("this system does not tell the peak of the resident set")
    names = ("lora_linear_4bit_fwd_bwd", memory.COMPARED)
    monkeypatch.setattr(memory, "PROVIDERS", {name: memory.PROVIDERS[name] for name in names})
    N, K = 2048, 2048
    measured = memory.measure(N, K, (16, 1), 1)
    assert (measured["N"], measured["K"], measured["threads"]) == (N, K, 1)
    fused, compared = (measured["extra"][name] for name in names)
    assert compared["1"] > 0.9 * 4 * N * K
    assert list(fused) == ["1", "16"]
    assert all(0 <= nbytes < 4 << 20 for nbytes in fused.values()), fused


def test_memory_that_cannot_be_measured_says_why(monkeypatch):
    monkeypatch.setattr(memory, "PROVIDERS", {"no such operator": None})
    (reason,) = memory.measure(64, 64, (1,), 1)["extra"].values()
    assert "no such operator" in reason


def test_growth_is_cold_at_every_size(monkeypatch):
    assert [N for N, _ in growth_shapes(20 << 30)] == [512, 1024, 2048, 4096, 8192, 16384]
    assert max(growth_shapes(8 << 30)) == (8192, 8192)
    assert {case.M for case in bench_growth.CASES} == {1, 16, 512}
    monkeypatch.setattr(providers.machine, "last_level_cache_bytes", lambda: 480 << 20)
    for case in bench_growth.CASES:
        for nbytes in (case.weight_bytes, 4 * case.N * case.K):
            assert 600 << 20 <= providers.copies(case, nbytes) * nbytes <= 3 << 30


def test_sixteen_bits_have_the_first_shape():
    shapes = {(case.N, case.K) for case in cases("linear_4bit") if case.dtype == "bfloat16"}
    assert shapes == {(4096, 4096)}


# -- targets -----------------------------------------------------------------------------------------


def case_of(op: str, N: int, K: int, M: int, **medians: float) -> dict:
    case = Case(op, N, K, M, R=16 if "lora" in op else 0)
    names = {"ours": OURS, "torch": "torch", "bnb": "bitsandbytes", "peft": "bitsandbytes + PEFT",
             "one": variants.thread_name(1), "half": variants.named("bfloat16"),
             "base": variants.BASE, "int8": INT8, "avx2": variants.named("avx2"),
             "ggml": report_targets.peer_ggml.NAME}  # fmt: skip
    results = {
        names[key]: {"median_ms": ms, "q1_ms": ms, "q3_ms": ms, "rounds": 4, "copies": 2}
        for key, ms in medians.items()
    }
    fields = {
        "op": op,
        "N": N,
        "K": K,
        "M": M,
        "dtype": "float32",
        "cache": "cold",
        "device": "cpu",
    }
    sizes = {"flops": case.flops, "bytes": case.bytes, "limit_ms": 1.0}
    return fields | sizes | {"providers": results, "popularity": "", "mixed": False}


@pytest.fixture
def document() -> dict:
    extra = {"linear_4bit": {"1": 1 << 20, "16": 9 << 20}, memory.COMPARED: {"1": 64 << 20, "16": 64 << 20},
             "linear_4bit, int8 activations": "not here"}  # fmt: skip
    return {
        "isa": "avx512", "threads": 2, "date": "2026-01-01", "commit": None,
        "cpu": {"model": "Test", "identity": "", "cores": 2, "last_level_cache_bytes": 1 << 20},
        "limits": {"read_gbs": 10.0, "sgemm_gflops": 100.0, "sgemm_avx2_gflops": 50.0},
        "versions": {"bitsandbytes": "0", "peft": "0"},
        "memory": {"N": 4096, "K": 4096, "threads": 2, "extra": extra},
        "cases": [
            case_of("linear_4bit", 4096, 4096, 16, ours=1.25, torch=5.0, bnb=10.0, one=2.5, half=1.5,
                    int8=0.5, ggml=1.0, avx2=15.0),
            case_of("linear_4bit_growth", 4096, 4096, 1, ours=2.0, torch=3.0),
            case_of("linear_4bit_growth", 512, 512, 1, ours=0.1, torch=3.0),
            case_of("lora_linear_4bit", 4096, 4096, 512, ours=1.05, base=1.0),
            case_of("lora_linear_4bit_fwd_bwd", 11008, 4096, 512, ours=1.0, peft=1.6),
            case_of("quantize_4bit", 4096, 4096, 0, ours=1.4, bnb=28.0),
        ],
    }  # fmt: skip


def test_verdicts(document):
    rows, verdicts = report_targets.by_tokens(document, (4096, 4096))
    cells = {tuple(row[:2]): row[2:] for row in rows}
    at_16 = {words: row[2] for (op, words), row in cells.items() if op == "y = x Wᵀ"}
    assert at_16["of the limit, avx512"] == "80% (75%)"
    assert at_16["against F.linear"] == "4.00x (4.00x)", "as many times as asked is enough"
    assert at_16["against bitsandbytes"] == "**8.00x (18x)**"
    assert at_16["int8 against ggml"] == "2.00x (1.50x)"
    assert at_16["against ggml"] == "**0.80x (1.10x)**"
    assert at_16["2 threads against 1"] == "2.00x (1.80x)"
    assert at_16["bfloat16 over float32"] == "**+20% (10%)**"
    # AVX2 against its own limit: 0.54 GFLOP at 50 GFLOP/s, not the 1 ms above
    assert at_16["of the limit, avx2"] == "**72% (75%)**"
    assert cells["LoRA forward", "over its base alone"][4] == "**+5% (4%)**"
    assert ("y = x Wᵀ", "against OpenVINO") not in cells, "no row without a figure"
    assert sum(v.met is None for v in verdicts) > 10, "but it counts"
    missed = report_targets.missed(verdicts)
    words = "y = x Wᵀ, 4096 x 4096, against bitsandbytes: M = 16: 56% short (at the limit 10x)"
    assert words in missed
    assert "y = x Wᵀ, 4096 x 4096, against ggml: M = 16: 27% short (at the limit 1.00x)" in missed
    assert "y = x Wᵀ, 4096 x 4096, bfloat16 over float32: M = 16: 10% too much" in missed


def test_an_isa_above_avx512(document):
    """Both have a row, and what other units make of a product may exceed the limit of sgemm."""
    (case,) = document["cases"][:1]
    case["providers"][variants.named("avx512")] = case["providers"][OURS]
    case["providers"][OURS] = case["providers"][INT8]
    rows, _ = report_targets.by_tokens(document | {"isa": "amx"}, (4096, 4096))
    of_limit = {row[1]: row[4] for row in rows if row[1].startswith("of the limit")}
    assert list(of_limit.items())[:2] == [
        ("of the limit, amx", "200% (75%)"), ("of the limit, avx512", "80% (75%)"),
    ]  # fmt: skip


def test_verdicts_of_training_quantization_memory(document):
    rows, _ = report_targets.by_tokens(document, (11008, 4096))
    assert rows[1][:2] == ["LoRA training", "against bitsandbytes + PEFT"]
    assert rows[1][-1] == "1.60x (1.50x)" and len(rows) == 2
    rows, verdicts = report_targets.of_formats(document)
    assert rows[1] == ["quantize_4bit, against bitsandbytes", "20x (20x)", "- (20x)"]
    assert rows[2][1] == "71% (67%)" and sum(v.met is None for v in verdicts) == 6
    rows, verdicts = report_targets.of_memory(document)
    assert rows[1:] == [["linear_4bit", "1.0", "**9.0**"], [memory.COMPARED, "64.0", "64.0"]]
    assert [v.met for v in verdicts] == [True, False]
    assert report_targets.missed(verdicts) == ["memory of linear_4bit: M = 16: 1.0 MiB too much"]


def test_targets_in_the_document(document):
    section = report.machine_section(document)
    counted = [line for line in section.splitlines() if "targets met" in line]
    assert len(counted) == 1 and counted[0].startswith("**8 of ")
    assert "- memory of linear_4bit: M = 16: 1.0 MiB too much" in section
    for words in report.text(document), section:
        assert "bfloat16" in words and "1.5 ±0% (+20%)" in words and "2.5 ±0% (2.00x)" in words
        assert "1 ±0% (the adapter adds 5%)" in words
    document["cases"], document["memory"] = document["cases"][1:3], None
    assert "targets" not in report.text(document) and "### Targets" not in report.machine_section(
        document
    )


def test_growth_table(document):
    _, *rows = report_cpu.growth_table(document)
    assert [row[1] for row in rows] == ["512 x 512", "4096 x 4096"]
    ps = 2.0e9 / 4096**2
    assert rows[1][2:7] == ["2 ±0%", "3 ±0%", "50%", "1", f"{ps:.3g}"]
    assert rows[1][7] == f"{2 * Case('', 4096, 4096, 1).weight_bytes / 2**20:.0f}"
    document["cases"] = document["cases"][:1]
    assert report_cpu.section(document, "x.png") == report_cpu.text(document) == []


def test_pictures(document, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    from bench import plots

    pictures = plots.write(document, tmp_path / "docs", "test")
    assert list(pictures) == ["speedup", "limit", "growth"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures.values())
    bare = json.loads(json.dumps(document))
    bare["cases"] = bare["cases"][-1:]
    assert list(plots.write(bare, tmp_path, "bare")) == ["speedup", "limit"]
