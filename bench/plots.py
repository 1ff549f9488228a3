"""The pictures of one machine's results, in docs/benchmarks."""

from __future__ import annotations

import pathlib

from lowrank_kernels.benchmark.ops import OURS
from lowrank_kernels.benchmark.report import machine_of, median
from lowrank_kernels.cli.pictures import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    RED,
    VIOLET,
    Line,
    Panel,
    draw,
    of_provider,
    over_rows,
)

from . import peer_ggml, peer_openvino, report, variants

TIMED = {
    "linear_4bit": "y = x Wᵀ",
    "lora_linear_4bit_fwd_bwd": "LoRA forward + backward, r = 16",
}
# (label, slow, fast, color): what is how many times faster than what
SPEEDUPS = (
    ("F.linear, float32", "torch", OURS, BLUE),
    ("bitsandbytes", "bitsandbytes", OURS, AMBER),
    ("bitsandbytes, training", "bitsandbytes, training", OURS, GREY),
    (peer_openvino.NAME, peer_openvino.NAME, OURS, GREEN),
    (peer_ggml.NAME, peer_ggml.NAME, OURS, VIOLET),
    ("int8 activations against ggml's", peer_ggml.NAME, variants.INT8, VIOLET),
)


def write(document: dict, folder: pathlib.Path, stem: str) -> dict[str, pathlib.Path]:
    """The pictures that ``document`` has the figures for: name -> file."""
    if "gpu" in document:
        drawings = {"time": _time(document)}
    else:
        drawings = {"speedup": _speedup(document), "limit": _limit(document)}
        if report.growth(document):
            drawings["growth"] = _growth(document)
    paths = {}
    for name, (title, panels) in drawings.items():
        paths[name] = folder / f"{stem}-{name}.png"
        draw(paths[name], f"{title}\n{_machine(document)}", panels)
    return paths


def _cases(document: dict, op: str, shape: tuple[int, int] | None) -> list[dict]:
    """Cold cases of the first dtype, by M."""
    dtype = document["cases"][0]["dtype"]
    group = [
        case
        for case in document["cases"]
        if (case["op"], case["N"], case["K"]) == (op, *(shape or ()))
        and (case["dtype"], case["cache"]) == (dtype, "cold")
    ]
    return sorted(group, key=lambda case: case["M"])


def _shapes(document: dict, op: str) -> list[tuple[int, int]]:
    return list(dict.fromkeys((c["N"], c["K"]) for c in document["cases"] if c["op"] == op))


def _first_shape(document: dict) -> tuple[int, int] | None:
    shapes = [*_shapes(document, "linear_4bit"), *_shapes(document, "linear_4bit_dx")]
    return shapes[0] if shapes else None


def _machine(document: dict) -> str:
    return f"{machine_of(document)}, {document['threads']} threads; {report.rates(document)}"


def _time(document: dict) -> tuple[str, list[Panel]]:
    """Of a GPU: one panel per operator, first shape, first dtype, cold caches."""
    first = document["cases"][0]
    shape = (first["N"], first["K"])
    title = f"W {shape[0]} x {shape[1]}, NF4 + double quantization, {first['dtype']}, cold caches"
    groups = [(_cases(document, op, shape), words) for op, words in TIMED.items()]
    return title, [over_rows(group, words) for group, words in groups if group]


def _speedup(document: dict) -> tuple[str, list[Panel]]:
    panels = []
    for shape in _shapes(document, "linear_4bit"):
        group = _cases(document, "linear_4bit", shape)
        tokens = [case["M"] for case in group]
        lines = [Line("", tokens, [1.0] * len(tokens), "-", "black")]
        for label, slow, fast, color in SPEEDUPS:
            pairs = [(c["M"], median(c, slow), median(c, fast)) for c in group]
            if points := [(M, a / b) for M, a, b in pairs if a and b]:
                style = "o--" if fast == variants.INT8 else "o-"
                lines.append(Line(label, *map(list, zip(*points)), style, color))
        title = f"W {shape[0]} x {shape[1]}"
        panels.append(Panel(title, "tokens M", "times faster than", lines, tokens, yscale="log"))
    return "How many times faster: y = x Wᵀ, float32, cold caches", panels


def _limit(document: dict) -> tuple[str, list[Panel]]:
    """Forward and dX at the first shape, for each instruction set."""
    panels, shape = [], _first_shape(document)
    for op, words in (("linear_4bit", "y = x Wᵀ"), ("linear_4bit_dx", "dx = dy W")):
        group, lines = _cases(document, op, shape), []
        for isa, color in zip(report.isas_of(document), (RED, AMBER, BLUE)):
            shares = [(c["M"], report.share(document, c, isa)) for c in group]
            if points := [(M, value) for M, value in shares if value]:
                label = f"{isa}, its own limit" if isa == "avx2" else isa
                lines.append(Line(label, *map(list, zip(*points)), color=color))
        tokens = [case["M"] for case in group]
        title = f"{words}, W {shape[0]} x {shape[1]}" if shape else words
        panels.append(Panel(title, "tokens M", "share of the limit", lines, tokens))
    return "Share of the limit, float32, cold caches", panels


def _growth(document: dict) -> tuple[str, list[Panel]]:
    """A panel per M over the number of weights, and one over threads."""
    panels = []
    for M, group in report.growth(document).items():
        sizes = [case["N"] * case["K"] for case in group]
        lines = [Line("limit", sizes, [case["limit_ms"] for case in group], "--", "black")]
        for name, color in ((OURS, RED), ("torch", BLUE)):
            lines += of_provider(list(zip(sizes, group)), name, color)
        axes = ("weights N·K", "milliseconds per call")
        panels.append(Panel(f"M = {M}", *axes, lines, xscale="log", yscale="log"))
    counts = [*variants.counts_below(document["threads"]), document["threads"]]
    lines = [Line("limit of arithmetic", counts, counts, "--", "black")]
    for case in _cases(document, "linear_4bit", _first_shape(document)):
        one = median(case, variants.thread_name(1))
        times = [(n, median(case, variants.thread_name(n))) for n in counts[:-1]]
        times.append((counts[-1], median(case, OURS)))
        if points := [(n, one / ms) for n, ms in times if one and ms]:
            lines.append(Line(f"M = {case['M']}", *map(list, zip(*points))))
    panels.append(Panel("threads", "threads", "times faster than 1 thread", lines, counts))
    return "Growth: y = x Wᵀ, float32, cold caches", panels
