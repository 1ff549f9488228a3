"""``python -m bench.report``: rewrites every number of the documents from bench/results/*.json.

What stands between ``<!-- bench:begin -->`` and ``<!-- bench:end -->`` in docs/performance.md and
README.md is generated; what stands outside is written by hand and left alone.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

from lowrank_kernels import files
from lowrank_kernels.benchmark import harness
from lowrank_kernels.benchmark import report as shared
from lowrank_kernels.benchmark.case import Case
from lowrank_kernels.benchmark.ops import OURS
from lowrank_kernels.benchmark.report import Rows, cell, median, names_of, of_limit

from . import variants
from .suite import GROWTH, POPULARITIES

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
PEERS = ("bitsandbytes", "bitsandbytes + PEFT")
GPU_PEERS = (*PEERS, "torch", "Unsloth's scheme")
OPS = [op for op in shared.TITLES if not op.startswith(("multi_lora", "model"))]
# Picture -> what it shows to who cannot see it.
PICTURES = {
    "time": "Time per call against the limit of the machine",
    "speedup": "How many times faster than others, by the number of tokens",
    "growth": "Time against the number of weights",
}
Tables = list[tuple[str, Rows]]  # each with a title


def machine_name(document: dict) -> str:
    """A file name for the machine: the GPU, or CPU model, instruction set and threads."""
    gpu = document.get("gpu")
    model = str(gpu["name"] if gpu else document["cpu"]["model"]).lower()
    for noise in ("(r)", "(tm)", "processor", "cpu"):
        model = model.replace(noise, " ")
    words = "".join(c if c.isalnum() or c == "." else " " for c in model).split()
    if not gpu:
        words += [str(document["isa"] or "reference"), f"{document['threads']}threads"]
    return "-".join(words)


def rates(document: dict) -> str:
    """The limits of the machine in words."""
    words = {
        "read_gbs": "memory read **{:.1f} GB/s**",
        "copy_gbs": "copy **{:.0f} GB/s** (bytes read and written)",
        "write_gbs": "write **{:.0f} GB/s**",
        "sgemm_gflops": "float32 matrix product **{:.0f} GFLOP/s**",
        "matmul_tflops": "bfloat16 matrix product **{:.0f} TFLOP/s** (random data)",
    }
    limits = document["limits"]
    return ", ".join(words[name].format(limits[name]) for name in words if name in limits)


# -- one adapter, or none --------------------------------------------------------------------------


def _variant_cell(document: dict, case: dict, name: str) -> str:
    """In parentheses what 16-bit activations and equal bits in every batch cost more, how many times faster all
    threads are than fewer, and for an instruction set that was forced the share of its limit: AVX2's is another."""
    theirs, ours, limits = median(case, name), median(case, OURS), document["limits"]
    if not (theirs and ours):
        return "-"
    words, limit = name.removeprefix(f"{OURS}, "), case["limit_ms"]
    if "thread" in words:
        told = f"{theirs / ours:.2f}x"
    elif words in variants.SIXTEEN_BITS or name == variants.INVARIANT:
        told = f"{theirs / ours - 1:+.0%}"
    elif name == variants.BASE:
        told = f"the adapter adds {ours / theirs - 1:.0%}"
    else:
        if words == "avx2" and "sgemm_avx2_gflops" in limits:
            bytes_s, flops_s = (
                case["bytes"] / limits["read_gbs"],
                case["flops"] / limits["sgemm_avx2_gflops"],
            )
            limit = max(bytes_s, flops_s) / 1e6
        told = f"{limit / theirs:.0%}"
    return f"{cell(case, name)} ({told})"


def _variants_table(document: dict, group: list[dict]) -> Rows:
    """A row per M of the cases of one table; nothing where none has variants."""
    names = [name for name in names_of(group) if variants.is_variant(name)]
    rows = [["M", OURS, "of limit", *(name.removeprefix(f"{OURS}, ") for name in names)]]
    for case in sorted(group, key=lambda case: case["M"]):
        others = (_variant_cell(document, case, name) for name in names)
        rows.append([str(case["M"]), cell(case, OURS), of_limit(case), *others])
    return rows if names else []


def _of_ops(document: dict) -> dict[str, Tables]:
    found: dict[str, Tables] = {}
    unit, versus = (", microseconds", GPU_PEERS) if "gpu" in document else ("", PEERS)
    for group in shared.groups(document, OPS).values():
        names = [name for name in names_of(group) if not variants.is_variant(name)]
        names.sort(key=lambda name: (name != OURS, name not in PEERS))
        title, of_op = shared.group_name(group), found.setdefault(shared.title(group), [])
        of_op.append((f"{title}{unit}", shared.table(group, names, versus)))
        if of_variants := _variants_table(document, group):
            of_op.append((f"{title}, {OURS} in other ways", of_variants))
    return found


# -- memory, growth --------------------------------------------------------------------------------


def memory_table(document: dict) -> Rows:
    """MiB beyond the outputs, a column per M; nothing where it was not measured."""
    extra = document.get("memory", {}).get("extra", {})
    by_name = {name: by_m for name, by_m in extra.items() if isinstance(by_m, dict)}
    tokens = sorted({int(M) for by_m in by_name.values() for M in by_m})
    rows = [["", *(f"M = {M}" for M in tokens)]]
    rows += [[n, *(f"{by_m[str(M)] / 2**20:.1f}" for M in tokens)] for n, by_m in by_name.items()]
    return rows if by_name else []


def growth(document: dict) -> dict[int, list[dict]]:
    """M -> its cases, from the smallest weight to the largest."""
    found: dict[int, list[dict]] = {}
    for case in sorted(document["cases"], key=lambda case: case["N"] * case["K"]):
        if case["op"] == GROWTH:
            found.setdefault(case["M"], []).append(case)
    return dict(sorted(found.items()))


def growth_table(document: dict) -> Rows:
    """A row per M and size; what of it all takes turns, so that a reader sees how cold it is."""
    rows = [
        ["M", "W", OURS, "torch", "of limit", "limit", "ns / 1000 weights", "4-bit MiB in turn"]
    ]
    for case in (case for cases in growth(document).values() for case in cases):
        N, K, ours = case["N"], case["K"], case["providers"].get(OURS, {})
        weights = ours.get("copies", 0) * Case("", N, K, case["M"]).weight_bytes / 2**20
        spent = f"{ours['median_ms'] * 1e9 / (N * K):.3g}" if "median_ms" in ours else "-"
        row = [str(case["M"]), f"{N} x {K}", cell(case, OURS), cell(case, "torch"), of_limit(case)]
        rows.append([*row, f"{case['limit_ms']:.3g}", spent, f"{weights:.0f}"])
    return rows if len(rows) > 1 else []


# -- many adapters in one batch --------------------------------------------------------------------

ADD = "multi_lora_"
MANY = {
    ADD: "`multi_lora_`: y += each row's adapter",
    "multi_lora_linear_4bit": "`multi_lora_linear_4bit`: base and adapters",
    "multi_lora_linear_4bit_fwd_bwd": "`multi_lora_linear_4bit`, forward and gradients of x and of every A, B",
}
GRID_PEERS = ("torch loop", "gather + bmm", "vLLM's CPU scheme")
MANY_WORDS = """\
*Identical*: all rows have one adapter; *uniform*: ceil(sqrt(rows)) adapters, evenly; *zipf 1.5*: adapters with 1, 1.5,
1.5², ... rows, rounded down; *distinct*: one row each (Punica's definitions and shape). Rows of one adapter are
adjacent. Pages and stacks have the dtype of the activations. *Mixed ranks*: 8, 16, 32 and 64 in turn. The batches of a
case take turns over adapters of their own, so that one with few adapters does not find them in a cache. *torch loop*,
for each adapter: `y[rows] += scaling * (x[rows] @ A.T) @ B.T`, the rows a slice; *addmm_*: the same in place.
*gather + bmm*: A and B of every row by `index_select`, then two `bmm`. *vLLM's CPU scheme*: every row's adapter out of
a stack padded to the largest rank, cast to the dtype of the result, `einsum`; written here after its source, not run
from it. *Padded to 64*: this library with every adapter stored at rank 64.""".replace("\n", " ")


def _popularity(name: str) -> str:
    return "zipf 1.5" if name == "zipf" else name


def _grid(document: dict) -> list[dict]:
    """The cases of the shape that has one of every popularity."""
    found: dict[tuple[int, int], list[dict]] = {}
    for case in document["cases"]:
        if case["op"] == ADD and not case["mixed"] and case["popularity"] in POPULARITIES:
            found.setdefault((case["N"], case["K"]), []).append(case)
    grids = (c for c in found.values() if {case["popularity"] for case in c} == {*POPULARITIES})
    return next(grids, [])


def _grid_table(grid: list[dict], peers: list[str]) -> Rows:
    """A row per M; per popularity our time, and how many times faster that is than each peer."""

    def of_case(case: dict | None) -> str:
        if not (case and (ours := median(case, OURS))):
            return "-"
        unit = 1e3 if case["device"] == "cuda" else 1.0
        ratios = (shared.times_faster(shared.ratio(case, name)) for name in peers)
        return f"{shared.digits(ours * unit)} ({', '.join(ratios)})"

    places = {(case["M"], case["popularity"]): case for case in grid}
    rows = [["rows", *map(_popularity, POPULARITIES)]]
    for M in sorted({M for M, _ in places}):
        rows.append([str(M), *(of_case(places.get((M, name))) for name in POPULARITIES)])
    return rows


def _rest_table(cases: list[dict]) -> Rows:
    """A row per case outside of the grid; a column per provider."""
    names = names_of(cases)
    rows = [["W", "dtype", "rows", "adapters", *names, "of limit"]]
    for case in cases:
        ranks = "mixed ranks" if case["mixed"] else f"r = {case['R']}"
        row = [f"{case['N']} x {case['K']}", case["dtype"], str(case["M"])]
        row.append(f"{_popularity(case['popularity'])}, {ranks}")
        rows.append([*row, *(cell(case, name) for name in names), of_limit(case)])
    return rows


def _of_many(document: dict) -> Tables:
    unit = "microseconds" if "gpu" in document else "milliseconds"
    grid, found = _grid(document), []
    if grid:
        case, peers = grid[0], [name for name in GRID_PEERS if name in names_of(grid)]
        words = f"W {case['N']} x {case['K']}, r = {case['R']}, {case['dtype']}: {unit}"
        found.append((f"{words} (times faster than {', '.join(peers)})", _grid_table(grid, peers)))
    for op, words in MANY.items():
        if rest := [case for case in document["cases"] if case["op"] == op and case not in grid]:
            found.append((f"{words}, {unit}", _rest_table(rest)))
    return found


# -- all of it -------------------------------------------------------------------------------------


def sections(document: dict) -> dict[str, Tables]:
    """Title -> tables, of all that there are results for."""
    found = _of_ops(document)
    if rows := memory_table(document):
        where = f"W {document['memory']['N']} x {document['memory']['K']}, MiB"
        found["Memory of a call beyond its outputs"] = [(where, rows)]
    if rows := growth_table(document):
        words = "Growth with the size of the weight: y = x Wᵀ, float32, cold caches"
        found[words] = [("Milliseconds; the weights of a case take turns", rows)]
    if tables := _of_many(document):
        found[f"Many adapters in one batch\n\n{MANY_WORDS}"] = tables
    return found


def text(document: dict) -> str:
    """All tables for a terminal."""
    where = f"{shared.machine_of(document)}, {document['threads']} threads"
    unit = "microseconds" if "gpu" in document else "milliseconds"
    lines = [f"{where}: {rates(document)}", f"{unit}, median ± half the interquartile range"]
    for words, tables in sections(document).items():
        for name, rows in tables:
            lines += ["", f"{words.splitlines()[0]}; {name}", "", shared.plain(rows)]
    return "\n".join(lines + shared.missing(document))


def _head(document: dict) -> list[str]:
    cpu, gpu, clock = document["cpu"], document.get("gpu"), ""
    versions = document["versions"].items()
    installed = ", ".join(f"{name} {number}" for name, number in versions if number)
    if gpu:
        name, built = gpu["name"], ", ".join(gpu["architectures"] or ["unknown architectures"])
        what = (
            f"Capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors, L2 "
            f"{gpu['l2_bytes'] / 2**20:.0f} MiB; driver {gpu['driver'] or 'unknown'}, CUDA {gpu['cuda']}; "
            f"kernels built for {built}, commit {document['commit'] or 'unknown'}"
        )
        if clocks := [state["sm_mhz"] for state in gpu["states"]]:
            clock = f"; clock {min(clocks):.0f} to {max(clocks):.0f} MHz after it"
    else:
        name = f"{cpu['model']}, {document['threads']} threads"
        cache = f"last-level cache {cpu['last_level_cache_bytes'] / 2**20:.0f} MiB"
        what = f"{cpu['identity']}; {cpu['cores']} cores, {cache}; kernels for {document['isa']}"
    lines = [f"## {name}", "", f"{what}. Measured {document['date']} with {installed}."]
    lines += ["", f"Limits, same run: {rates(document)}{clock}."]
    if not document.get("complete", True):
        lines += ["", "**The run was cut short: cases are missing.**"]
    return [*lines, "", f"**{document['note']}**"] if document.get("note") else lines


def machine_section(document: dict, plots: dict[str, str] | None = None) -> str:
    """One machine's part of docs/performance.md. ``plots``: their paths by plots.py's names."""
    pictures = {name: f"![{PICTURES[name]}]({path})" for name, path in (plots or {}).items()}
    of_growth, lines = pictures.pop("growth", None), _head(document)  # stands with its table
    for picture in pictures.values():
        lines += ["", picture]
    for words, tables in sections(document).items():
        lines += ["", f"### {words}"]
        lines += ["", of_growth] if of_growth and words.startswith("Growth") else []
        for name, rows in tables:
            lines += ["", f"{name}:", "", shared.markdown(rows)]
    return "\n".join(lines + shared.missing(document))


def readme_section(document: dict) -> str:
    """The short table of README.md: the first shape, float32, cold caches."""
    wanted = {
        "linear_4bit": "inference, y = x Wᵀ",
        "lora_linear_4bit_fwd_bwd": "LoRA training, forward and backward, r = 16",
    }
    shape = (document["cases"][0]["N"], document["cases"][0]["K"])
    rows = [["", "M", "bitsandbytes, ms", "lowrank_kernels, ms", "faster", "of limit"]]
    for op, words in wanted.items():
        group = shared.groups(document, wanted).get((op, *shape, "float32", "cold"), [])
        for case in sorted(group, key=lambda case: case["M"]):
            ours = median(case, OURS)
            peer = next((ms for name in PEERS if (ms := median(case, name))), None)
            if ours and peer:
                times = [shared.digits(peer), shared.digits(ours), f"{peer / ours:.1f}x"]
                rows.append([words, str(case["M"]), *times, of_limit(case)])
                words = ""
    versions = document["versions"]
    words = (
        f"W {shape[0]} x {shape[1]}, NF4 with double quantization, float32, cold caches; "
        f"{document['cpu']['model']}, {document['threads']} threads; bitsandbytes "
        f"{versions['bitsandbytes']} (for training with PEFT {versions['peft']}). *Of limit*: share of what memory "
        "bandwidth or float32 arithmetic of the machine allow, measured in the same run. "
        "All numbers: [docs/performance.md](docs/performance.md)."
    )
    return f"{shared.markdown(rows)}\n\n{words}"


def replace_block(path: pathlib.Path, block: str) -> str:
    """Puts ``block`` between the markers of ``path``, if there are such a file and markers; what it did, in words."""
    content = path.read_text() if path.exists() else ""
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        return f"skipped {path}: no {BEGIN} ... {END} in it"
    with files.written(path) as file:
        file.write(f"{before}{BEGIN}\n{block}\n{END}{after}".encode())
    return f"wrote {path}"


def write_documents(results: pathlib.Path, root: pathlib.Path) -> list[str]:
    """Rewrites the blocks and plots under ``root``; what it did, in words.

    README.md shows the CPU with the newest result that has bitsandbytes in it.
    """
    from . import plots

    docs, documents, parts, done = root / "docs", [], [], []
    for path in sorted(results.glob("*.json")):
        document = harness.read(path)
        pictures = plots.write(document, docs / "benchmarks", path.stem)
        relative = {name: os.path.relpath(p, docs) for name, p in pictures.items()}
        parts.append(machine_section(document, relative))
        documents.append(document)
        done += [f"wrote {picture}" for picture in pictures.values()]
    if not documents:
        raise FileNotFoundError(f"no results in {results}: run python -m bench first")
    done.append(replace_block(docs / "performance.md", "\n\n".join(parts)))
    if of_cpus := [document for document in documents if "gpu" not in document]:
        first = max(of_cpus, key=lambda d: (bool(d["versions"].get("bitsandbytes")), d["date"]))
        done.append(replace_block(root / "README.md", readme_section(first)))
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--root", type=pathlib.Path, default=ROOT, metavar="FOLDER")
    args = parser.parse_args()
    try:
        print("\n".join(write_documents(args.results, args.root)))
    except FileNotFoundError as error:
        sys.exit(f"bench.report: {error}")
