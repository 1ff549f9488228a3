"""``python -m bench.report``: rewrites every number of the documents from bench/results/*.json.

What stands between ``<!-- bench:begin -->`` and ``<!-- bench:end -->`` in docs/performance.md and
README.md is generated; what stands outside is written by hand and left alone.
"""

from __future__ import annotations

import os
import pathlib

from lowrank_kernels import files
from lowrank_kernels.benchmark import harness
from lowrank_kernels.benchmark import report as shared
from lowrank_kernels.benchmark.ops import OURS
from lowrank_kernels.benchmark.report import Rows, cell, median, names_of, of_limit

from .suite import INT8

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
PEERS = ("bitsandbytes", "bitsandbytes + PEFT")
GPU_PEERS = (*PEERS, "torch", "torch + PEFT")
OPS = [op for op in shared.TITLES if not op.startswith(("multi_lora", "model"))]
PICTURE = "How many times faster than others, by the number of tokens"
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
        "sgemm_gflops": "float32 matrix product **{:.0f} GFLOP/s**",
        "matmul_tflops": "bfloat16 matrix product **{:.0f} TFLOP/s** (random data)",
    }
    limits = document["limits"]
    return ", ".join(words[name].format(limits[name]) for name in words if name in limits)


# -- one adapter, or none --------------------------------------------------------------------------


def _of_ops(document: dict) -> dict[str, Tables]:
    found: dict[str, Tables] = {}
    unit, versus = (", microseconds", GPU_PEERS) if "gpu" in document else ("", PEERS)
    for group in shared.groups(document, OPS).values():
        names = sorted(names_of(group), key=lambda name: (name != OURS, name not in PEERS))
        others = [name for name in names if name.startswith(f"{OURS}, ") and name != INT8]
        names = [name for name in names if name not in others]
        title, of_op = shared.group_name(group), found.setdefault(shared.title(group), [])
        of_op.append((f"{title}{unit}", shared.table(group, names, versus)))
        if others:
            of_op.append(
                (f"{title}{unit}, in other ways", shared.table(group, [OURS, *others], ()))
            )
    return found


# -- many adapters in one batch --------------------------------------------------------------------

MANY = {
    "multi_lora_": "`multi_lora_`: y += each row's adapter",
    "multi_lora_linear_4bit": "`multi_lora_linear_4bit`: base and adapters",
}
MANY_WORDS = """\
*Identical*: all rows have one adapter; *uniform*: ceil(sqrt(rows)) adapters, evenly; *zipf 1.5*: adapters with 1, 1.5,
1.5², ... rows, rounded down; *distinct*: one row each (Punica's definitions and shape). Rows of one adapter are
adjacent. Pages and stacks have the dtype of the activations. *Mixed ranks*: 8, 16, 32 and 64 in turn. The batches of a
case take turns over adapters of their own, so that one with few adapters does not find them in a cache. *torch loop*,
for each adapter: `y[rows] += scaling * (x[rows] @ A.T) @ B.T`, the rows a slice; *addmm_*: the same in place.
*gather + bmm*: A and B of every row by `index_select` out of a stack padded to the largest rank, then two
`bmm`.""".replace("\n", " ")


def _many_table(cases: list[dict]) -> Rows:
    """A row per case; a column per provider."""
    names = names_of(cases)
    rows = [["W", "dtype", "rows", "adapters", *names, "of limit"]]
    for case in cases:
        name = "zipf 1.5" if case["popularity"] == "zipf" else case["popularity"]
        ranks = "mixed ranks" if case["mixed"] else f"r = {case['R']}"
        row = [f"{case['N']} x {case['K']}", case["dtype"], str(case["M"]), f"{name}, {ranks}"]
        rows.append([*row, *(cell(case, name) for name in names), of_limit(case)])
    return rows


def _of_many(document: dict) -> Tables:
    unit = "microseconds" if "gpu" in document else "milliseconds"
    found = {op: [case for case in document["cases"] if case["op"] == op] for op in MANY}
    return [(f"{MANY[op]}, {unit}", _many_table(cases)) for op, cases in found.items() if cases]


# -- all of it -------------------------------------------------------------------------------------


def sections(document: dict) -> dict[str, Tables]:
    """Title -> tables, of all that there are results for."""
    found = _of_ops(document)
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
    cpu, gpu = document["cpu"], document.get("gpu")
    versions = document["versions"].items()
    installed = ", ".join(f"{name} {number}" for name, number in versions if number)
    if gpu:
        name, built = gpu["name"], ", ".join(gpu["architectures"] or ["unknown architectures"])
        what = (
            f"Capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors, L2 "
            f"{gpu['l2_bytes'] / 2**20:.0f} MiB; driver {gpu['driver'] or 'unknown'}, CUDA {gpu['cuda']}; "
            f"kernels built for {built}, commit {document['commit'] or 'unknown'}"
        )
    else:
        name = f"{cpu['model']}, {document['threads']} threads"
        cache = f"last-level cache {cpu['last_level_cache_bytes'] / 2**20:.0f} MiB"
        what = f"{cpu['identity']}; {cpu['cores']} cores, {cache}; kernels for {document['isa']}"
    lines = [f"## {name}", "", f"{what}. Measured {document['date']} with {installed}."]
    lines += ["", f"Limits, same run: {rates(document)}."]
    if not document.get("complete", True):
        lines += ["", "**The run was cut short: cases are missing.**"]
    return [*lines, "", f"**{document['note']}**"] if document.get("note") else lines


def machine_section(document: dict, picture: str = "") -> str:
    """One machine's part of docs/performance.md. ``picture``: its path, if there is one."""
    lines = _head(document) + (["", f"![{PICTURE}]({picture})"] if picture else [])
    for words, tables in sections(document).items():
        lines += ["", f"### {words}"]
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
        picture = docs / "benchmarks" / f"{path.stem}-speedup.png"
        if drawn := plots.speedup(document, picture):
            done.append(f"wrote {picture}")
        parts.append(machine_section(document, os.path.relpath(picture, docs) if drawn else ""))
        documents.append(document)
    if not documents:
        raise FileNotFoundError(f"no results in {results}: run python -m bench first")
    done.append(replace_block(docs / "performance.md", "\n\n".join(parts)))
    if of_cpus := [document for document in documents if "gpu" not in document]:
        first = max(of_cpus, key=lambda d: (bool(d["versions"].get("bitsandbytes")), d["date"]))
        done.append(replace_block(root / "README.md", readme_section(first)))
    return done


if __name__ == "__main__":
    print("\n".join(write_documents(RESULTS, ROOT)))
