"""``python -m bench.report``: rewrites every number of the documents from bench/results/*.json.

What stands between ``<!-- bench:begin -->`` and ``<!-- bench:end -->`` in docs/performance.md and
README.md is generated; what stands outside is written by hand and left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys

from lowrank_kernels.tables import digits, times_faster

from . import report_cpu, report_multi, report_targets
from .tables import (
    OURS,
    cell,
    is_variant,
    markdown,
    median,
    of_limit,
    plain,
    ratio,
)

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
PEERS = ("bitsandbytes", "bitsandbytes + PEFT")
TITLES = {
    "linear_4bit": "`linear_4bit`: y = x Wᵀ",
    "linear_4bit_dx": "`linear_4bit_dx`: dx = dy W",
    "lora_linear_4bit": "`lora_linear_4bit`, forward, r = 16",
    "lora_linear_4bit_fwd_bwd": "`lora_linear_4bit`, forward and gradients of x, A, B, r = 16",
    "quantize_4bit": "`quantize_4bit`: NF4 with double quantization",
    "dequantize_4bit": "`dequantize_4bit`",
}


# Picture -> what it shows to who cannot see it; "growth" stands with its table.
PICTURES = {
    "time": "Time per call against the limit of the machine",
    "speedup": "How many times faster than others, by the number of tokens",
    "limit": "Share of the limit of the machine, by the number of tokens",
}
# On a GPU: what columns are called where that is not the provider's name, and who else is a peer.
GPU_NAMES = {"torch": "cuBLAS"}
GPU_PEERS = ("torch", "Unsloth's scheme")


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


# -- tables ----------------------------------------------------------------------------------------


def peer_of(case: dict) -> str | None:
    return next((name for name in case["providers"] if name in PEERS), None)


def _groups(document: dict) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for case in document["cases"]:
        if case["op"] not in TITLES:  # many adapters and growth have tables of their own
            continue
        key = (case["op"], case["N"], case["K"], case["dtype"], case["cache"])
        groups.setdefault(key, []).append(case)
    order = list(TITLES)
    return dict(sorted(groups.items(), key=lambda item: order.index(item[0][0])))


def _table(group: list[dict]) -> list[list[str]]:
    """Header and rows: time per provider, ratios to its peers, share of the limit.

    On a CPU the peer is bitsandbytes, on a GPU others are as well; dequantizing has a rate, too.
    """
    first = group[0]
    names = list(dict.fromkeys(name for case in group for name in case["providers"]))
    names = [name for name in names if not is_variant(name)]
    names.sort(key=lambda name: (name != OURS, name not in PEERS))
    on_gpu, rows = first.get("device") == "cuda", []
    peers = [name for name in names if name in PEERS or (on_gpu and name in GPU_PEERS)]
    called = GPU_NAMES if on_gpu else {}
    head = ["M"] if first["M"] else []
    head += [called.get(name, name) for name in names]
    head += [f"vs {called.get(name, name)}" for name in peers]
    head += ["of limit"] if first["cache"] == "cold" else []
    with_rate = on_gpu and first["op"] == "dequantize_4bit"
    head += ["GB/s written"] if with_rate else []
    for case in sorted(group, key=lambda case: case["M"]):
        row = [str(case["M"])] if case["M"] else []
        row += [cell(case, name) for name in names]
        row += [times_faster(ratio(case, peer)) for peer in peers]
        row += [of_limit(case)] if case["cache"] == "cold" else []
        row += [written(case)] if with_rate else []
        rows.append(row)
    return [head, *rows]


def written(case: dict) -> str:
    """GB/s at which this library writes the dense matrix, 2 bytes an element."""
    ours = median(case, OURS)
    return f"{2 * case['N'] * case['K'] / ours / 1e6:.0f}" if ours else "-"


def _group_name(key: tuple) -> str:
    _, N, K, dtype, cache = key
    return f"W {N} x {K}, {dtype}, {cache} caches"


def _rates(document: dict) -> str:
    """The limits of the machine in words."""
    limits = document["limits"]
    if "gpu" in document:
        return (
            f"copies {limits['copy_gbs']:.0f} GB/s, writes {limits['write_gbs']:.0f} GB/s, "
            f"bfloat16 matmul {limits['matmul_tflops']:.0f} TFLOP/s"
        )
    return (
        f"reads {limits['read_gbs']:.1f} GB/s, float32 matmul {limits['sgemm_gflops']:.0f} GFLOP/s"
    )


def text(document: dict) -> str:
    """All tables for a terminal."""
    machine = f"{document['cpu']['model']}, {document['threads']} threads, {document['isa']}"
    unit = "milliseconds"
    if gpu := document.get("gpu"):
        machine, unit = gpu["name"], "microseconds"
    lines = [
        f"{machine}: {_rates(document)}",
        f"{unit}, median ± half the interquartile range",
    ]
    for key, group in _groups(document).items():
        lines += ["", f"{TITLES[key[0]]}; {_group_name(key)}", plain(_table(group))]
        if of_variants := report_cpu.variants_table(document, group):
            lines += ["", f"{OURS} in other ways; {_group_name(key)}", plain(of_variants)]
    lines += report_cpu.text(document) + report_multi.text(document)
    if not gpu:
        lines += report_targets.text(document)
    return "\n".join(lines + missing(document))


def missing(document: dict) -> list[str]:
    """What did not run, and why; of what failed also where, since no other case need fail."""
    reasons = set()
    for case in document["cases"]:
        where = f"{case['op']} {case['N']}x{case['K']}" + (f" M={case['M']}" if case["M"] else "")
        for name, result in case["providers"].items():
            if "unavailable" in result:
                reasons.add(f"{name} did not run: {result['unavailable']}")
            if "error" in result:
                reasons.add(f"{name} failed, {where}: {result['error']}")
    return ["", *sorted(reasons)] if reasons else []


# -- documents -------------------------------------------------------------------------------------


def _cpu_head(document: dict) -> list[str]:
    cpu, limits = document["cpu"], document["limits"]
    return [
        f"## {cpu['model']}, {document['threads']} threads",
        "",
        f"{cpu['identity']}; {cpu['cores']} cores, last-level cache "
        f"{cpu['last_level_cache_bytes'] / 2**20:.0f} MiB; kernels for {document['isa']}. "
        f"Measured {document['date']} with {_installed(document)}.",
        "",
        f"Limits, same run: memory read **{limits['read_gbs']:.1f} GB/s**, "
        f"float32 matrix product **{limits['sgemm_gflops']:.0f} GFLOP/s**.",
    ]


def _gpu_head(document: dict) -> list[str]:
    gpu, limits = document["gpu"], document["limits"]
    built = ", ".join(gpu["architectures"] or ["unknown architectures"])
    lines = [
        f"## {gpu['name']}",
        "",
        f"Capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors, L2 "
        f"{gpu['l2_bytes'] / 2**20:.0f} MiB; driver {gpu['driver'] or 'unknown'}, CUDA "
        f"{gpu['cuda']}; kernels built for {built}. Measured {document['date']} at commit "
        f"{document['commit'] or 'unknown'} with {_installed(document)}.",
        "",
        f"Limits, same run: copy **{limits['copy_gbs']:.0f} GB/s** (bytes read and written), write "
        f"**{limits['write_gbs']:.0f} GB/s**, bfloat16 matrix product "
        f"**{limits['matmul_tflops']:.0f} TFLOP/s** (random data){_clocks(gpu['states'])}.",
    ]
    if not document.get("complete", True):
        lines += ["", "**The run was cut short: cases are missing.**"]
    if document.get("note"):
        lines += ["", f"**{document['note']}**"]
    return lines


def _clocks(states: list[dict]) -> str:
    clocks = [state["sm_mhz"] for state in states if state.get("sm_mhz")]
    return f"; clock {min(clocks):.0f} to {max(clocks):.0f} MHz after it" if clocks else ""


def _installed(document: dict) -> str:
    return ", ".join(f"{name} {number}" for name, number in document["versions"].items() if number)


def machine_section(document: dict, plots: dict[str, str] | None = None) -> str:
    """One machine's part of docs/performance.md. ``plots``: their paths by plots.py's names."""
    on_gpu, plots = "gpu" in document, plots or {}
    lines = _gpu_head(document) if on_gpu else _cpu_head(document)
    for name, words in PICTURES.items():
        if name in plots:
            lines += ["", f"![{words}]({plots[name]})"]
    if not on_gpu:
        lines += report_targets.section(document)
    op = None
    for key, group in _groups(document).items():
        if key[0] != op:
            op = key[0]
            lines += ["", f"### {TITLES[op]}"]
        unit = ", microseconds" if on_gpu else ""
        lines += ["", f"{_group_name(key)}{unit}:", "", markdown(_table(group))]
        if of_variants := report_cpu.variants_table(document, group):
            lines += ["", f"{_group_name(key)}, {OURS} in other ways:", "", markdown(of_variants)]
    lines += report_cpu.section(document, plots.get("growth"))
    lines += report_multi.section(document)
    return "\n".join(lines + missing(document))


def readme_section(document: dict) -> str:
    """The short table of README.md: the first shape, float32, cold caches."""
    wanted = {
        "linear_4bit": "inference, y = x Wᵀ",
        "lora_linear_4bit_fwd_bwd": "LoRA training, forward and backward, r = 16",
    }
    shape = (document["cases"][0]["N"], document["cases"][0]["K"])
    rows = [["", "M", "bitsandbytes, ms", "lowrank_kernels, ms", "faster", "of limit"]]
    for op, words in wanted.items():
        group = _groups(document).get((op, *shape, "float32", "cold"), [])
        for case in sorted(group, key=lambda case: case["M"]):
            ours, peer = median(case, OURS), median(case, peer_of(case))
            if ours and peer:
                share = f"{case['limit_ms'] / ours:.0%}"
                rows.append(
                    [
                        words,
                        str(case["M"]),
                        digits(peer),
                        digits(ours),
                        f"{peer / ours:.1f}x",
                        share,
                    ]
                )
                words = ""
    return "\n".join(
        [
            markdown(rows),
            "",
            f"W {shape[0]} x {shape[1]}, NF4 with double quantization, float32, cold caches; "
            f"{document['cpu']['model']}, {document['threads']} threads; bitsandbytes "
            f"{document['versions']['bitsandbytes']} (for training with PEFT "
            f"{document['versions']['peft']}). *Of limit*: share of what memory bandwidth or "
            "float32 arithmetic of the machine allow, measured in the same run. "
            "All numbers: [docs/performance.md](docs/performance.md).",
        ]
    )


def replace_block(path: pathlib.Path, block: str) -> bool:
    """Puts ``block`` between the markers of ``path``; False where there is no such file or marker."""
    content = path.read_text() if path.exists() else ""
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        return False
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(f"{before}{BEGIN}\n{block}\n{END}{after}")
    os.replace(temporary, path)
    return True


def _primary(documents: list[dict]) -> dict:
    """The CPU that README.md shows: the newest result with bitsandbytes in it."""
    with_peer = [d for d in documents if d["versions"].get("bitsandbytes")] or documents
    return max(with_peer, key=lambda document: document["date"])


def write_documents(results: pathlib.Path, root: pathlib.Path) -> list[str]:
    """Rewrites the blocks and plots under ``root``; what it did, in words."""
    from . import plots

    documents, sections, done = [], [], []
    for path in sorted(results.glob("*.json")):
        document = json.loads(path.read_text())
        pictures = plots.write(document, root / "docs" / "benchmarks", path.stem)
        relative = {name: os.path.relpath(p, root / "docs") for name, p in pictures.items()}
        sections.append(machine_section(document, relative))
        documents.append(document)
        done += [f"wrote {picture}" for picture in pictures.values()]
    if not documents:
        raise FileNotFoundError(f"no results in {results}: run python -m bench first")
    blocks = {root / "docs" / "performance.md": "\n\n".join(sections)}
    if of_cpus := [document for document in documents if "gpu" not in document]:
        blocks[root / "README.md"] = readme_section(_primary(of_cpus))
    for path, block in blocks.items():
        written = replace_block(path, block)
        done.append(f"wrote {path}" if written else f"skipped {path}: no {BEGIN} ... {END} in it")
    return done


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--root", type=pathlib.Path, default=ROOT, metavar="FOLDER")
    args = parser.parse_args(argv)
    try:
        print("\n".join(write_documents(args.results, args.root)))
    except FileNotFoundError as error:
        sys.exit(f"bench.report: {error}")


if __name__ == "__main__":
    main()
