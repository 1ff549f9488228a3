"""The benchmark suite on tiny sizes: results, limits, cold caches, wrong results found, tables and pages."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys

import pytest

import lowrank_kernels as lk

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # `bench` is no part of the installed package

from bench import limits, report, suite, targets, test_ops  # noqa: E402
from bench.__main__ import main, parse  # noqa: E402
from lowrank_kernels.benchmark import check, harness, machine, models, providers, timing  # noqa: E402
from lowrank_kernels.benchmark import multi_providers as many  # noqa: E402
from lowrank_kernels.benchmark.case import Case, rows_per_adapter  # noqa: E402
from lowrank_kernels.benchmark.ops import OURS  # noqa: E402

RESULTS = sorted(report.RESULTS.glob("*.json"))
TINY = suite.SIZES["cpu"].chosen([(96, 128)], [1, 17])


# -- a run, and the documents made of it -------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[dict, str]:
    """The document and the printed tables of one tiny run; it ends with an error if a result was wrong."""
    output = tmp_path_factory.mktemp("bench") / "tiny.json"
    sizes = ("--shape", "96x128", "--tokens", "1", "--tokens", "17", "--seconds", "0.01")
    sizes = ("--threads", "1", *sizes)
    command = [sys.executable, "-m", "bench", "--quick", *sizes, "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text()), done.stdout


def test_results(run):
    """Every case of every operator, with what a reader needs to judge the numbers."""
    document, printed = run
    assert document["schema"] == harness.SCHEMA and document["versions"]["torch"]
    assert document["threads"] == 1 and document["cpu"]["model"] and "complete" not in document
    assert document["limits"]["read_gbs"] > 0.1 and document["limits"]["sgemm_gflops"] > 0.1
    expected = {case: of_case for case, of_case in suite.entries(TINY)}
    fields = [field.name for field in dataclasses.fields(Case)]
    measured = {Case(**{f: case[f] for f in fields}): case for case in document["cases"]}
    assert measured.keys() == expected.keys()
    for case, result in measured.items():
        limit = case.limit_seconds(*limits.rates(document["limits"], case.dtype))
        assert result["limit_ms"] == pytest.approx(1e3 * limit)
        assert "median_ms" in result["providers"][OURS], case
        for provider in result["providers"].values():
            if provider.get("unavailable"):
                continue
            assert 0 < provider["q1_ms"] <= provider["median_ms"] <= provider["q3_ms"]
            assert provider["rounds"] >= 3 and provider["copies"] >= 1
            assert 0 <= provider["relative_error"] < check.TOLERANCE
    titles = [title.splitlines()[0] for title in report.sections(document)]
    assert len(titles) == 8 and all(title in printed for title in titles)


def test_results_are_added_to(run, tmp_path, monkeypatch, set_threads):
    """Of one machine: what is measured anew takes the place of what was, the rest stays; so does the best limit."""
    document = json.loads(json.dumps(run[0]))
    document["limits"]["read_gbs"] = 1e6
    for case in document["cases"]:
        case["providers"] = {"before": dict.fromkeys(("median_ms", "q1_ms", "q3_ms"), 1.0)}
    (into := tmp_path / "x.json").write_text(json.dumps(document))
    sizes = ["--op", "linear_4bit_dx", "--shape", "96x128", "--tokens", "17", "--threads", "1"]
    words = [*sizes, "--seconds", "1e-3", "--quick", "--into"]
    monkeypatch.setattr(limits, "measure", lambda device, found: None)
    monkeypatch.setattr(timing, "keep_freed_memory", lambda: True)
    main([*words, str(into)])
    added = harness.read(into)
    assert len(added["cases"]) == len(document["cases"]) and added["limits"]["read_gbs"] == 1e6
    anew = [(c["op"], c["M"]) for c in added["cases"] if "before" not in c["providers"]]
    assert anew and set(anew) == {("linear_4bit_dx", 17)}
    into.write_text(json.dumps(document | {"versions": {"torch": "1.0"}}))
    with pytest.raises(SystemExit, match=r"versions: \{'torch': '1.0'\} there"):
        main([*words, str(into)])


def test_documents(run, tmp_path, monkeypatch):
    """What is generated replaces what stood between the markers; a second run changes nothing."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    docs.mkdir()
    with pytest.raises(FileNotFoundError, match="python -m bench"):
        report.write_documents(results, tmp_path)
    names = (OURS, models.BITSANDBYTES, models.DENSE, f"{OURS}, medium")
    ms = dict.fromkeys(("median_ms", "q1_ms", "q3_ms"), 4.0)
    of_model = [
        case.document() | {"providers": {n: ms | case.rate(ms) for n in names}}
        for dtype in ("float32", "bfloat16")
        for case in models.cases("tinyllama-4", dtype, 16, "cpu")
    ]
    document = run[0] | {"cases": run[0]["cases"] + of_model}
    (results / "tiny.json").write_text(json.dumps(document))
    page, readme = docs / "performance.md", tmp_path / "README.md"
    page.write_text(f"by hand\n{report.BEGIN}\nstale numbers\n{report.END}\nalso by hand\n")
    done = report.write_documents(results, tmp_path)
    assert any("skipped" in line and "README.md" in line for line in done)
    text, machine = page.read_text(), (docs / "performance/tiny.md").read_text()
    assert text.startswith("by hand\n") and text.endswith("\nalso by hand\n")
    assert "stale numbers" not in text and text.count("(benchmarks/tiny-") == 1
    assert "(performance/tiny.md)" in text and "(../benchmarks/tiny-speedup.png)" in machine
    parts = (
        'tinyllama-4, float32, r = 16, "medium":',
        "## Against the goals",
        "`linear_4bit`: y = x",
    )
    assert [machine.index(part) for part in parts] == sorted(map(machine.index, parts))
    assert (docs / "benchmarks/tiny-speedup.png").read_bytes().startswith(b"\x89PNG")
    readme.write_text(f"# x\n{report.BEGIN}\n{report.END}\n")
    monkeypatch.setattr(report, "SHORT", (96, 128))
    report.write_documents(results, tmp_path)
    short = readme.read_text()
    assert 0 < short.index("tinyllama-4, bfloat16") < short.index("LoRA training")
    assert "64000 ±0% |" in short, "tokens per second of prefill"
    assert (docs / "performance/tiny.md").read_text() == machine
    assert {path.name for path in docs.iterdir()} == {"benchmarks", "performance", "performance.md"}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_documents_are_those_of_the_committed_results(path):
    document = harness.read(path)
    name, picture = path.stem, f"benchmarks/{path.stem}-speedup.png"
    assert (ROOT / "docs" / picture).exists()
    page = (ROOT / "docs/performance" / f"{name}.md").read_text()
    assert page == report.machine_page(document, f"../{picture}")
    summary = report.summary(document, f"performance/{name}.md", picture)
    assert summary in (ROOT / "docs/performance.md").read_text()
    newest = max(map(harness.read, RESULTS), key=report.newest)
    assert report.readme_section(newest) in (ROOT / "README.md").read_text()


def test_what_is_missing_is_named():
    document = harness.read(report.RESULTS / "intel-xeon-6-167-amx-2threads.json")
    document["cases"][0]["providers"] |= {
        "bitsandbytes": {"unavailable": "not installed"},
        "torch": {"error": "wrong result"},
    }
    lines = report.shared.missing(document)
    assert "bitsandbytes did not run: not installed" in lines
    assert "torch failed, linear_4bit 4096x4096 M=1: wrong result" in lines
    row = next(iter(report.sections(document).values()))[0][1][1]
    assert "failed" in row and "-" in row


def test_the_goals():
    """What is measured stands beside what it should be; of several peers the fastest counts."""

    def case(M: int, dtype: str, limit: float = 1.5, **ms: float) -> dict:
        known = {"bnb": "bitsandbytes", "ours": OURS, "ort": targets.peer_int4.ORT}
        found = {
            known.get(n, n): {"median_ms": value, "relative_error": 3e-3} for n, value in ms.items()
        }
        fields = {
            "op": "linear_4bit",
            "N": 4096,
            "K": 4096,
            "M": M,
            "dtype": dtype,
            "cache": "cold",
        }
        return fields | {"limit_ms": limit, "providers": found}

    of_model = {"op": "model", "model": "tinyllama-4", "phase": "train", "dtype": "bfloat16"}
    of_model["providers"] = {OURS: {"median_ms": 2.0}, models.BITSANDBYTES: {"median_ms": 2.5}}
    exact = case(16, "float32", ours=2.0, ort=3.0, torch=2.5)
    wide = case(4, "bfloat16", ours=2.0, bnb=2.2) | {"N": 11008}
    cases = [case(4, "bfloat16", ours=2.0, bnb=2.5, torch=4.0), exact, wide, of_model]
    rows = {tuple(row[:2]): row[2:] for row in targets.of_operators({"cases": cases})}
    assert rows["bfloat16, against bitsandbytes", "4096 x 4096"][1] == "1.25 ≥ 1.20"
    assert rows["bfloat16, against bitsandbytes", "11008 x 4096"][1] == "1.10 ≥ 1.08"
    assert rows["bfloat16, against dense", "4096 x 4096"][1] == "2.00 < 2.50"
    assert rows["float32, best exact peer", "4096 x 4096"] == ["-", "-", "1.25 < 1.30", "-", "-"]
    assert rows["bfloat16, share of the limit", "4096 x 4096"][1] == "0.75 ≥ 0.75"
    assert ("int8, best int8 peer", "4096 x 4096") not in rows
    measured = [row[-1] for row in targets.of_models({"cases": cases})]
    assert "1.25 < 1.30" in measured and "-" in measured
    assert [OURS, "bfloat16", "3.0e-03 > 2.2e-03"] in targets.errors({"cases": cases[:1]})


@pytest.mark.parametrize("content", ['{"schema": 99, "cases": []}', "[]", '{"cases": []}'])
def test_results_of_another_format_are_refused(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match="schema 1 to"):
        harness.read(tmp_path / "x.json")


@pytest.mark.parametrize("wrong", ["--threads 0", "--op none", "--shape 4096", "--tokens 0"])
def test_wrong_arguments(wrong):
    with pytest.raises(SystemExit) as error:
        parse(wrong.split())
    assert error.value.code == 2


# -- what is counted ---------------------------------------------------------------------------------


def test_limits():
    case = Case("linear_4bit", 4096, 4096, 16)
    assert case.flops == 2 * 16 * 4096 * 4096
    assert case.weight_bytes == 4096 * 4096 // 2 + 4096 * 64 + 4 * 1024
    assert case.bytes == case.weight_bytes + 2 * 16 * 4096 * 4
    # arithmetic: 0.537 GFLOP at 256 GFLOP/s; memory: 9.2 MB at 22 GB/s
    assert case.limit_seconds(22.0, 256.0) == pytest.approx(2.097e-3, rel=1e-3)
    one = Case("linear_4bit", 4096, 4096, 1)
    assert one.limit_seconds(22.0, 256.0) == pytest.approx(0.395e-3, rel=1e-2)
    forward = Case("lora_linear_4bit", 64, 128, 8, R=16)
    both = Case("lora_linear_4bit_fwd_bwd", 64, 128, 8, R=16)
    base, adapter = 2 * 8 * 64 * 128, 2 * 8 * 16 * (64 + 128)
    assert forward.flops == base + adapter and both.flops == 2 * base + 3 * adapter
    of_cpu = {"read_gbs": 22.0, "sgemm_gflops": 256.0, "bf16_gflops": 500.0}
    assert limits.rates(of_cpu) == (22.0, 256.0)
    assert limits.rates(of_cpu, "bfloat16") == (22.0, 500.0)
    assert limits.rates(of_cpu | {"bf16_gflops": 30.0}, "bfloat16") == (22.0, 256.0)
    assert limits.rates({"copy_gbs": 4000.0, "matmul_tflops": 700.0}) == (4000.0, 700e3)


def test_the_best_turn_is_the_limit(monkeypatch):
    monkeypatch.setattr(limits, "_product", lambda size, dtype=None: None)
    work, _ = limits.LIMITS["cpu"]["read_gbs"]
    monkeypatch.setitem(limits.LIMITS["cpu"], "read_gbs", (work, lambda: None))
    found = {}
    for seconds in (0.1, 0.05, 0.2):
        monkeypatch.setattr(limits, "best_seconds", lambda call, device, s=seconds: s)
        limits.measure("cpu", found)
    assert found["read_gbs"] == pytest.approx(21.47, rel=1e-3)
    assert found["sgemm_gflops"] == pytest.approx(343.6, rel=1e-3)


def case_of_many(op: str, M: int, popularity: str, mixed=False, dtype="float32", cache="cold"):
    return Case(op, 96, 128, M, dtype, cache, 64 if mixed else 4, "cpu", popularity, mixed)


def test_what_many_adapters_cost():
    """Each adapter of the batch is read once, at its own rank; y is read and written."""
    case = case_of_many("multi_lora_", 6, "distinct", mixed=True)
    ranks = [8, 16, 32, 64, 8, 16]
    assert case.ranks == ranks and case.flops == 2 * sum(ranks) * (96 + 128)
    assert case.bytes == 4 * (sum(ranks) * (96 + 128) + 6 * (128 + 2 * 96))
    zipf = case_of_many("multi_lora_linear_4bit", 5, "zipf", dtype="bfloat16")
    assert zipf.flops == 2 * 5 * 96 * 128 + 2 * 5 * 4 * (96 + 128)
    adapters = len(rows_per_adapter(5, "zipf"))
    assert zipf.bytes == zipf.weight_bytes + 2 * (adapters * 4 + 5) * (96 + 128)


def test_rows_per_adapter():
    """Punica's definitions, by hand."""
    assert rows_per_adapter(16, "identical") == [16]
    assert rows_per_adapter(3, "distinct") == [1, 1, 1]
    assert rows_per_adapter(64, "uniform") == [8] * 8
    assert rows_per_adapter(7, "uniform") == [3, 2, 2]
    assert rows_per_adapter(64, "zipf") == [17, 17, 11, 7, 5, 3, 2, 1, 1]
    assert rows_per_adapter(512, "4") == [128] * 4
    for popularity in suite.POPULARITIES:
        for M in range(1, 70):
            rows = rows_per_adapter(M, popularity)
            assert sum(rows) == M and min(rows) > 0 and rows == sorted(rows, reverse=True)


# -- cold caches -------------------------------------------------------------------------------------


def test_cold_weights_exceed_the_cache():
    case = Case("linear_4bit", 4096, 4096, 1)
    count = providers.copies(case, case.weight_bytes)
    assert (count - 1) * case.weight_bytes >= 1.25 * machine.last_level_cache_bytes()
    assert providers.copies(dataclasses.replace(case, cache="hot"), 1) == 1
    weights = providers.weights_4bit(Case("linear_4bit", 64, 2048, 1))[:3]
    assert len({w.packed.data_ptr() for w in weights}) == len(weights) > 1


def test_batches_of_few_adapters_are_cold_too(monkeypatch):
    """All that the calls of a case read exceeds the cache, and no call reads what another one does."""
    monkeypatch.setattr(machine, "last_level_cache_bytes", lambda: 1 << 20)
    for batch in ((1, "identical"), (9, "uniform")):
        read = []
        for call in many.many_lowrank(case_of_many("multi_lora_", *batch)):
            plan, pages = call.args[2:]
            read += [(id(pages), name) for name in plan.names]
        assert len(set(read)) == len(read)
        assert len(read) * 4 * (96 + 128) * 4 > 1.25 * (1 << 20)


# -- cases, and who computes them --------------------------------------------------------------------


def test_cases():
    """Models come first, a shape's cases together; 16-bit activations have the first shape alone but in linear_4bit."""
    everything = suite.entries(suite.SIZES["cpu"])
    entries = [entry for entry in everything if entry[0].op != "model"]
    of_models = [(case.model, case.dtype, case.phase) for case, _ in everything[:12]]
    phases = ("train", "prefill", "decode")
    assert of_models == list(itertools.product(suite.MODELS, ("float32", "bfloat16"), phases))
    assert not any(case.op == "model" for case, _ in everything[12:])
    assert f"{models.FUSED}, medium" in everything[0][1]
    assert all(", medium" not in name for name in everything[3][1]), "of bfloat16"
    shapes = [shape for shape, _ in itertools.groupby((case.N, case.K) for case, _ in entries)]
    assert len(shapes) == len(set(shapes))
    linear = [case for case, _ in entries if case.op == "linear_4bit"]
    assert len(linear) == 20 and all(case.cache == "cold" for case in linear)
    others = [
        case
        for case, _ in entries
        if not case.op.startswith(("linear_4bit", "experts")) or case.op == "linear_4bit_dx"
        if case.dtype == "bfloat16"
    ]
    assert {(case.N, case.K) for case in others} == {(4096, 4096)}
    assert len([case for case, _ in entries if case.op.startswith("multi_lora")]) == 21
    few = suite.entries(suite.SIZES["cpu"], ["linear_4bit"], only="M16-", quick=True)
    assert {(case.N, case.M) for case, _ in few} == {(4096, 16)}
    names = {case.id: set(of_case) for case, of_case in entries}
    grid = names["multi_lora_-11008x4096-M64-distinct-float32-cold"]
    mixed = names["multi_lora_-4096x4096-M64-distinct-mixed-float32-cold"]
    assert mixed - grid == {"torch loop, addmm_"}


SPOIL = {
    "linear_4bit": lambda y: 2 * y,
    "linear_4bit_dx": lambda y: y[:, :-1],
    "lora_linear_4bit": lambda y: y * float("nan"),
    "lora_linear_4bit_fwd_bwd": lambda gradients: (*gradients[:-1], gradients[-1] * 1.05),
    "multi_lora_": lambda y: 2 * y,
    "multi_lora_linear_4bit": lambda y: y.flip(0),
    "quantize_4bit": lambda w: dataclasses.replace(w, absmax=w.absmax.flip(0)),
}


@pytest.mark.parametrize("op", SPOIL)
def test_a_wrong_result_is_not_timed(op):
    """The others of its case are."""
    case, of_case = next(entry for entry in suite.entries(TINY) if entry[0].op == op)

    def wrong(case: Case) -> providers.Calls:
        return [lambda call=call: SPOIL[op](call()) for call in of_case[OURS].calls(case)]

    results = harness.measure(case, {OURS: of_case[OURS], "wrong": harness.Provider(wrong)}, 1e-6)
    assert "median_ms" in results[OURS]
    assert results["wrong"]["error"].startswith(("wrong result: relative error", "shapes"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("M, popularity, mixed", [(7, "zipf", False), (6, "distinct", True)])
@pytest.mark.parametrize("op", ["multi_lora_", "multi_lora_linear_4bit"])
def test_every_batch_has_its_own_adapters(op, M, popularity, mixed, dtype, monkeypatch):
    """Each call of each provider gives what its own adapters make of the rows, and not those of the next call."""
    monkeypatch.setattr(providers, "MAX_COPIES", 2)
    case = case_of_many(op, M, popularity, mixed, dtype)
    of_op = next(
        p for c, p in suite.entries(TINY) if c.op == op and (c.mixed or op != "multi_lora_")
    )
    for name, provider in of_op.items():
        outputs = []
        for call in provider.calls(case):
            output = call()
            outputs.append(output.clone())
            if op == "multi_lora_":  # on a CPU all calls add to one y
                output.zero_()
        assert len(outputs) == 2 * case.groups, name
        check.verify(case, outputs, 0.02 if dtype == "bfloat16" else 2e-6)
        if case.groups > 1:
            with pytest.raises(check.Wrong):
                check.verify(case, outputs[1:])


# -- this library in other ways, freed memory, pytest-benchmark --------------------------------------


def test_in_other_ways():
    """The instruction set is what the name says while a call runs, and only then."""
    seen, before = [], lk.backends.isa()

    def calls(case):
        right = providers.linear_lowrank(case)[0]
        return [lambda: seen.append(lk.backends.isa()) or right()]

    case = Case("linear_4bit", 96, 128, 1)
    isas = {isa for isa in lk.backends.isas()[1:] if isa != "scalar"}
    found = suite.in_other_ways(case, calls)
    assert found.keys() == {f"{OURS}, {name}" for name in (*isas, "batch-invariant")}
    for isa in isas:
        name = f"{OURS}, {isa}"
        assert "median_ms" in harness.measure(case, {name: found[name]}, 1e-6)[name]
        assert seen[-1] == isa and lk.backends.isa() == before
    exactly = suite.in_other_ways(dataclasses.replace(case, dtype="bfloat16"), calls)
    assert exactly.keys() == {f"{OURS}, exact"}


def test_int8_where_there_is_none(monkeypatch):
    monkeypatch.setattr(lk.backends, "report", lambda: {"int8": None})
    case = Case("linear_4bit", 96, 128, 5, cache="hot")
    result = harness.measure(case, {"int8": suite.LINEAR_PEERS["float32"][suite.INT8]}, 1e-6)[
        "int8"
    ]
    assert "VNNI" in result["unavailable"]


KEEP = """
import resource, torch
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


PYTEST = """
import sys, pytest
from bench import suite
suite.SIZES["cpu"] = suite.SIZES["cpu"].chosen([(96, 128)], [1])
words = ["bench", "-q", "--benchmark-only", "-k", "M1-float32-cold-lowrank_kernels"]
sys.exit(pytest.main([*words, "-p", "no:cacheprovider", "--benchmark-json", sys.argv[1]]))
"""


def test_cases_in_pytest_benchmark(tmp_path):
    words = [sys.executable, "-c", PYTEST, str(tmp_path / "x.json")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "x.json").read_text())["benchmarks"]
    groups = {benchmark["group"] for benchmark in found}
    assert groups == {f"{op}-96x128-M1-float32-cold" for op in test_ops.OPS}
    assert all(benchmark["stats"]["rounds"] >= test_ops.MIN_ROUNDS for benchmark in found)
