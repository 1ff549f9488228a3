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

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
OURS, PEERS = "lowrank_kernels", ("bitsandbytes", "bitsandbytes + PEFT")
TITLES = {
    "linear_4bit": "`linear_4bit`: y = x Wᵀ",
    "linear_4bit_dx": "`linear_4bit_dx`: dx = dy W",
    "lora_linear_4bit": "`lora_linear_4bit`, forward, r = 16",
    "lora_linear_4bit_fwd_bwd": "`lora_linear_4bit`, forward and gradients of x, A, B, r = 16",
    "quantize_4bit": "`quantize_4bit`: NF4 with double quantization",
    "dequantize_4bit": "`dequantize_4bit`",
}


# -- tables ----------------------------------------------------------------------------------------


def _ms(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def median(case: dict, provider: str) -> float | None:
    return case["providers"].get(provider, {}).get("median_ms")


def peer_of(case: dict) -> str:
    return next(name for name in case["providers"] if name in PEERS)


def ratio(case: dict) -> float | None:
    """How many times faster than bitsandbytes this library is; None if one of them did not run."""
    ours, peer = median(case, OURS), median(case, peer_of(case))
    return peer / ours if ours and peer else None


def _row(case: dict, names: list[str]) -> list[str]:
    cells = [str(case["M"])] if case["M"] else []
    for name in names:
        result = case["providers"].get(name, {})
        if "median_ms" not in result:
            cells.append("-")
            continue
        spread = (result["q3_ms"] - result["q1_ms"]) / 2 / result["median_ms"]
        cells.append(f"{_ms(result['median_ms'])} ±{spread:.0%}")
    times, ours = ratio(case), median(case, OURS)
    cells.append(f"{times:.1f}x" if times else "-")
    if case["cache"] == "cold":
        cells.append(f"{case['limit_ms'] / ours:.0%}" if ours else "-")
    return cells


def _groups(document: dict) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for case in document["cases"]:
        key = (case["op"], case["N"], case["K"], case["dtype"], case["cache"])
        groups.setdefault(key, []).append(case)
    order = list(TITLES)
    return dict(sorted(groups.items(), key=lambda item: order.index(item[0][0])))


def _table(group: list[dict]) -> list[list[str]]:
    """Header and rows: milliseconds per provider, ratio to bitsandbytes, share of the limit."""
    names = list(group[0]["providers"])
    names.sort(key=lambda name: (name != OURS, name not in PEERS))
    head = (["M"] if group[0]["M"] else []) + names + [f"vs {peer_of(group[0])}"]
    if group[0]["cache"] == "cold":
        head.append("of limit")
    return [head] + [_row(case, names) for case in sorted(group, key=lambda case: case["M"])]


def _markdown(table: list[list[str]]) -> str:
    head, *rows = (f"| {' | '.join(row)} |" for row in table)
    return "\n".join([head, "|" + " ---: |" * len(table[0]), *rows])


def _plain(table: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join(
        "  " + "  ".join(c.rjust(w) for c, w in zip(row, widths)).rstrip() for row in table
    )


def _group_name(key: tuple) -> str:
    _, N, K, dtype, cache = key
    return f"W {N} x {K}, {dtype}, {cache} caches"


def text(document: dict) -> str:
    """All tables for a terminal."""
    limits = document["limits"]
    lines = [
        f"{document['cpu']['model']}, {document['threads']} threads, {document['isa']}: "
        f"reads {limits['read_gbs']:.1f} GB/s, float32 matmul {limits['sgemm_gflops']:.0f} GFLOP/s",
        "milliseconds, median ± half the interquartile range",
    ]
    for key, group in _groups(document).items():
        lines += ["", f"{TITLES[key[0]]}; {_group_name(key)}", _plain(_table(group))]
    return "\n".join(lines + _missing(document))


def _missing(document: dict) -> list[str]:
    reasons = {
        f"{name} did not run: {result['unavailable']}"
        for case in document["cases"]
        for name, result in case["providers"].items()
        if "unavailable" in result
    }
    return ["", *sorted(reasons)] if reasons else []


# -- documents -------------------------------------------------------------------------------------


def machine_section(document: dict, plot: str | None) -> str:
    """One machine's part of docs/performance.md."""
    cpu, limits, versions = document["cpu"], document["limits"], document["versions"]
    installed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    lines = [
        f"## {cpu['model']}, {document['threads']} threads",
        "",
        f"{cpu['identity']}; {cpu['cores']} cores, last-level cache "
        f"{cpu['last_level_cache_bytes'] / 2**20:.0f} MiB; kernels for {document['isa']}. "
        f"Measured {document['date']} with {installed}.",
        "",
        f"Limits, same run: memory read **{limits['read_gbs']:.1f} GB/s**, "
        f"float32 matrix product **{limits['sgemm_gflops']:.0f} GFLOP/s**.",
    ]
    if plot:
        lines += ["", f"![Time per call against the limit of the machine]({plot})"]
    op = None
    for key, group in _groups(document).items():
        if key[0] != op:
            op = key[0]
            lines += ["", f"### {TITLES[op]}"]
        lines += ["", f"{_group_name(key)}:", "", _markdown(_table(group))]
    return "\n".join(lines + _missing(document))


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
                    [words, str(case["M"]), _ms(peer), _ms(ours), f"{peer / ours:.1f}x", share]
                )
                words = ""
    return "\n".join(
        [
            _markdown(rows),
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
    """The machine that README.md shows: the newest result with bitsandbytes in it."""
    with_peer = [d for d in documents if d["versions"].get("bitsandbytes")] or documents
    return max(with_peer, key=lambda document: document["date"])


def write_documents(results: pathlib.Path, root: pathlib.Path) -> list[str]:
    """Rewrites the blocks under ``root`` and the plots beside the results; what it did, in words."""
    from . import plots

    documents, sections, done = [], [], []
    for path in sorted(results.glob("*.json")):
        document = json.loads(path.read_text())
        picture = path.with_suffix(".png")
        plots.write(document, picture)
        sections.append(machine_section(document, os.path.relpath(picture, root / "docs")))
        documents.append(document)
        done.append(f"wrote {picture}")
    if not documents:
        raise FileNotFoundError(f"no results in {results}: run python -m bench first")
    blocks = {
        root / "docs" / "performance.md": "\n\n".join(sections),
        root / "README.md": readme_section(_primary(documents)),
    }
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
