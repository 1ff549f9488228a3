"""``python -m bench.report``: rewrites every number of the documents from bench/results/*.json.

The pages of docs/performance, one for each machine, are generated, and so is what stands between the markers
``<!-- bench:begin -->`` and ``<!-- bench:end -->`` in docs/performance.md and README.md; what stands outside of them is
written by hand and left alone.
"""

from __future__ import annotations

import pathlib
import re

from lowrank_kernels import files
from lowrank_kernels.benchmark import harness
from lowrank_kernels.benchmark import report as shared
from lowrank_kernels.benchmark.ops import OURS
from lowrank_kernels.benchmark.report import Rows, cell, median, names_of, of_limit

from . import targets
from .suite import INT8, MEDIUM

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
PEERS = ("bitsandbytes", "bitsandbytes + PEFT")
GPU_PEERS = (*PEERS, "torch", "torch + PEFT")
OPS = [op for op in shared.TITLES if not op.startswith(("multi_lora", "model"))]
PICTURE = "How many times faster than others, by the number of tokens"
SHORT = (4096, 4096)  # of the short tables
Tables = list[tuple[str, Rows]]  # each with a title


def machine_name(document: dict) -> str:
    """A file name for the machine: the GPU, or CPU model, instruction set and threads.

    Virtual machines often name CPUs of several generations alike; family and model tell those apart.
    """
    gpu = document.get("gpu")
    model = str(gpu["name"] if gpu else document["cpu"]["model"]).lower()
    for noise in ("(r)", "(tm)", "processor", "cpu"):
        model = model.replace(noise, " ")
    words = "".join(c if c.isalnum() or c == "." else " " for c in model).split()
    if not gpu:
        words += [] if any(c.isdigit() for c in model) else _generation(document)
        words += [str(document["isa"] or "reference"), f"{document['threads']}threads"]
    return "-".join(words)


def _generation(document: dict) -> list[str]:
    """The numbers of the CPU's family and model, where the system tells."""
    return re.findall(r"(?:family|model) (\d+)", document["cpu"]["identity"])


def rates(document: dict) -> str:
    """The limits of the machine in words."""
    words = {
        "read_gbs": "memory read **{:.1f} GB/s**",
        "copy_gbs": "copy **{:.0f} GB/s** (bytes read and written)",
        "sgemm_gflops": "float32 matrix product **{:.0f} GFLOP/s**",
        "bf16_gflops": "bfloat16 matrix product **{:.0f} GFLOP/s**",
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
        own = (INT8, MEDIUM)
        others = [name for name in names if name.startswith(f"{OURS}, ") and name not in own]
        names = [name for name in names if name not in others]
        title, of_op = shared.group_name(group), found.setdefault(shared.title(group), [])
        of_op.append((f"{title}{unit}", shared.table(group, names, versus)))
        if others:
            of_op.append(
                (f"{title}{unit}, in other ways", shared.table(group, [OURS, *others], ()))
            )
    return found


# -- whole models ----------------------------------------------------------------------------------

MODEL_WORDS = """\
Tokens per second with adapters of r = 16 on all linear layers of the model: a step of training on 2 x 256 tokens
(forward, backward, AdamW on the adapters), reading 256 tokens, and decoding one token after another. *tinyllama-4*:
4 layers of TinyLlama's shape (2048, 5632, 32 heads, 4 of keys and values) with random weights and a vocabulary of 2048,
so that the head, which is dense for all, does not outweigh the layers. *"medium"*: under
`torch.set_float32_matmul_precision("medium")`.""".replace("\n", " ")
MODEL_PEERS = ("bitsandbytes + PEFT", "torch + PEFT")


def _of_models(document: dict) -> Tables:
    found = []
    for group in shared.groups(document, ["model"]).values():
        for suffix, words in (("", ""), (", medium", ', "medium"')):
            names = [name for name in names_of(group) if name.endswith(", medium") == bool(suffix)]
            if names:
                versus = [peer + suffix for peer in MODEL_PEERS]
                title = shared.group_name(group) + words
                found.append((title, shared.table(group, names, versus)))
    return found


def _of_targets(document: dict) -> Tables:
    """Only of CPUs whose bfloat16 products were measured."""
    if "bf16_gflops" not in document["limits"]:
        return []
    tables = {
        "`linear_4bit`, how many times faster, and the goal": targets.of_operators(document),
        "`Experts4bit`, how many times faster, and the goal": targets.of_experts(document),
        "Whole models, how many times as many tokens, and the goal": targets.of_models(document),
        "Largest relative error of `linear_4bit` against float64": targets.errors(document),
    }
    return [(title, rows) for title, rows in tables.items() if len(rows) > 1]


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
    found: dict[str, Tables] = {}
    if tables := _of_models(document):
        found[f"Whole models\n\n{MODEL_WORDS}"] = tables
    if tables := _of_targets(document):
        found["Against the goals"] = tables
    found |= _of_ops(document)
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


def machine_title(document: dict) -> str:
    if gpu := document.get("gpu"):
        return gpu["name"]
    cpu = document["cpu"]
    named = any(c.isdigit() for c in cpu["model"]) or not _generation(document)
    model = cpu["model"] if named else f"{cpu['model']} ({cpu['identity']})"
    return f"{model}, {document['isa']}, {document['threads']} threads"


def _head(document: dict) -> list[str]:
    cpu, gpu = document["cpu"], document.get("gpu")
    versions = document["versions"].items()
    installed = ", ".join(f"{name} {number}" for name, number in versions if number)
    if gpu:
        built = ", ".join(gpu["architectures"] or ["unknown architectures"])
        what = (
            f"Capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors, L2 "
            f"{gpu['l2_bytes'] / 2**20:.0f} MiB; driver {gpu['driver'] or 'unknown'}, CUDA {gpu['cuda']}; "
            f"kernels built for {built}, commit {document['commit'] or 'unknown'}"
        )
    else:
        cache = f"last-level cache {cpu['last_level_cache_bytes'] / 2**20:.0f} MiB"
        what = f"{cpu['identity']}; {cpu['cores']} cores, {cache}; kernels for {document['isa']}"
    lines = [f"{what}. Measured {document['date']} with {installed}."]
    lines += ["", f"Limits, same run: {rates(document)}."]
    if not document.get("complete", True):
        lines += ["", "**The run was cut short: cases are missing.**"]
    return [*lines, "", f"**{document['note']}**"] if document.get("note") else lines


def machine_page(document: dict, picture: str = "") -> str:
    """One machine's page. ``picture``: its path, if there is one."""
    lines = [
        f"# {machine_title(document)}",
        "",
        "How it was measured: [Performance](../performance.md).",
    ]
    lines += ["", *_head(document)] + (["", f"![{PICTURE}]({picture})"] if picture else [])
    for words, tables in sections(document).items():
        lines += ["", f"## {words}"]
        for name, rows in tables:
            lines += ["", f"{name}:", "", shared.markdown(rows)]
    return "\n".join([*lines, *shared.missing(document), ""])


def summary(document: dict, page: str, picture: str = "") -> str:
    """One machine in docs/performance.md."""
    lines = [f"### {machine_title(document)}", "", f"All numbers: [{page}]({page})."]
    lines += ["", f"![{PICTURE}]({picture})"] if picture else []
    for rows in (_model_rows(document), _layer_rows(document)):
        lines += ["", shared.markdown(rows)] if len(rows) > 1 else []
    return "\n".join(lines)


def _model_rows(document: dict) -> Rows:
    """Tokens per second of the first model."""
    names = (*MODEL_PEERS, OURS)
    rows = [["tokens per second", "", *names, f"vs {names[0]}"]]
    of_models = list(shared.groups(document, ["model"]).values())
    for group in reversed([g for g in of_models if g[0]["model"] == of_models[0][0]["model"]]):
        words = f"{group[0]['model']}, {group[0]['dtype']}"
        for case in group:
            rates = [cell(case, name) for name in names]
            rows.append(
                [words, case["phase"], *rates, shared.times_faster(shared.ratio(case, names[0]))]
            )
            words = ""
    return rows


def _layer_rows(document: dict) -> Rows:
    """Milliseconds of 4096 x 4096, few and many rows, with cold caches."""
    wanted = {
        "linear_4bit": "inference, y = x Wᵀ",
        "lora_linear_4bit_fwd_bwd": "LoRA training, forward and backward, r = 16",
    }
    rows = [["layer", "M", "bitsandbytes, ms", "lowrank_kernels, ms", "faster", "of limit"]]
    for (op, N, K, dtype, cache), group in shared.groups(document, wanted).items():
        words = f"{wanted[op]}, {dtype}"
        for case in sorted(group, key=lambda case: case["M"]):
            ours = median(case, OURS)
            peer = next((ms for name in PEERS if (ms := median(case, name))), None)
            if ours and peer and (N, K, cache) == (*SHORT, "cold") and case["M"] in (1, 16, 512):
                times = [shared.digits(peer), shared.digits(ours), shared.times_faster(peer / ours)]
                rows.append([words, str(case["M"]), *times, of_limit(case)])
                words = ""
    return rows


def readme_section(document: dict) -> str:
    """The short tables of README.md: a model, then one layer."""
    versions, parts = document["versions"], []
    if len(model := _model_rows(document)) > 1:
        parts += [shared.markdown(model), "r = 16 on all linear layers; training: 2 x 256 tokens."]
    parts.append(shared.markdown(_layer_rows(document)))
    parts.append(
        f"W 4096 x 4096, NF4 with double quantization, cold caches; {document['cpu']['model']}, "
        f"{document['threads']} threads; bitsandbytes {versions['bitsandbytes']}, PEFT {versions['peft']}. "
        "*Of limit*: share of what memory bandwidth or arithmetic of the machine allow, measured in the same run. "
        "All numbers: [docs/performance.md](docs/performance.md)."
    )
    return "\n\n".join(parts)


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
    """Rewrites pages, blocks and pictures under ``root``; what it did, in words. The newest CPU comes first.

    README.md shows the CPU with the newest result that has bitsandbytes in it.
    """
    from . import plots

    docs, parts, done = root / "docs", [], []
    documents = {path.stem: harness.read(path) for path in sorted(results.glob("*.json"))}
    if not documents:
        raise FileNotFoundError(f"no results in {results}: run python -m bench first")
    (docs / "performance").mkdir(exist_ok=True)
    for name, document in sorted(documents.items(), key=lambda item: newest(item[1]), reverse=True):
        picture, page = f"benchmarks/{name}-speedup.png", f"performance/{name}.md"
        if drawn := plots.speedup(document, docs / picture):
            done.append(f"wrote {docs / picture}")
        with files.written(docs / page) as file:
            file.write(machine_page(document, f"../{picture}" if drawn else "").encode())
        done.append(f"wrote {docs / page}")
        parts.append(summary(document, page, picture if drawn else ""))
    done.append(replace_block(docs / "performance.md", "\n\n".join(parts)))
    if of_cpus := [document for document in documents.values() if "gpu" not in document]:
        block = readme_section(max(of_cpus, key=newest))
        done.append(replace_block(root / "README.md", block))
    return done


def newest(document: dict) -> tuple:
    return "gpu" not in document, bool(document["versions"].get("bitsandbytes")), document["date"]


if __name__ == "__main__":
    print("\n".join(write_documents(RESULTS, ROOT)))
