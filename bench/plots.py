"""The pictures of one machine's results, in docs/benchmarks."""

from __future__ import annotations

import pathlib

from lowrank_kernels.benchmark.ops import OURS
from lowrank_kernels.benchmark.report import groups, machine_of, median
from lowrank_kernels.cli import pictures as p

from . import peer_ggml, peer_openvino, report, variants

TIMED = {"linear_4bit": "y = x Wᵀ", "lora_linear_4bit_fwd_bwd": "LoRA forward + backward, r = 16"}
# (label, slow, fast, color): what is how many times faster than what
SPEEDUPS = (
    ("F.linear, float32", "torch", OURS, p.BLUE),
    ("bitsandbytes", "bitsandbytes", OURS, p.AMBER),
    ("bitsandbytes, training", "bitsandbytes, training", OURS, p.GREY),
    (peer_openvino.NAME, peer_openvino.NAME, OURS, p.GREEN),
    (peer_ggml.NAME, peer_ggml.NAME, OURS, p.VIOLET),
    ("int8 activations against ggml's", peer_ggml.NAME, variants.INT8, p.VIOLET),
)


def write(document: dict, folder: pathlib.Path, stem: str) -> dict[str, pathlib.Path]:
    """The pictures that ``document`` has the figures for: name -> file."""
    if "gpu" in document:
        drawings = {"time": ("Time per call", _time(document))}
    else:
        drawings = {"speedup": ("How many times faster: y = x Wᵀ", _speedup(document))}
        drawings |= {"growth": ("Growth: y = x Wᵀ", _growth(document))}
    first = document["cases"][0]
    where = f"{machine_of(document)}, {document['threads']} threads; {report.rates(document)}"
    paths = {}
    for name, (title, panels) in drawings.items():
        if panels:
            paths[name] = folder / f"{stem}-{name}.png"
            words = f"{title}, {first['dtype']}, cold caches\n{where.replace('*', '')}"
            p.draw(paths[name], words, panels)
    return paths


def _cold(document: dict, op: str) -> dict[tuple, list[dict]]:
    """Shape -> the cold cases of the first dtype, by M."""
    dtype = document["cases"][0]["dtype"]
    found = groups(document, [op]).items()
    return {key[1:3]: group for key, group in found if key[3:] == (dtype, "cold")}


def _time(document: dict) -> list[p.Panel]:
    """Of a GPU: one panel per operator, at the first shape."""
    found = {words: list(_cold(document, op).items())[:1] for op, words in TIMED.items()}
    return [
        p.over_rows(group, f"{words}, W {N} x {K}")
        for words, of_op in found.items()
        for (N, K), group in of_op
    ]


def _speedup(document: dict) -> list[p.Panel]:
    panels = []
    for (N, K), group in _cold(document, "linear_4bit").items():
        tokens = [case["M"] for case in group]
        lines = [p.Line("", tokens, [1.0] * len(tokens), "-", "black")]
        for label, slow, fast, color in SPEEDUPS:
            pairs = [(c["M"], median(c, slow), median(c, fast)) for c in group]
            if points := [(M, a / b) for M, a, b in pairs if a and b]:
                style = "o--" if fast == variants.INT8 else "o-"
                lines.append(p.Line(label, *map(list, zip(*points)), style, color))
        axes = (f"W {N} x {K}", "tokens M", "times faster than")
        panels.append(p.Panel(*axes, lines, tokens, yscale="log"))
    return panels


def _growth(document: dict) -> list[p.Panel]:
    """A panel per M over the number of weights."""
    panels = []
    for M, group in report.growth(document).items():
        sizes = [case["N"] * case["K"] for case in group]
        lines = [p.Line("limit", sizes, [case["limit_ms"] for case in group], "--", "black")]
        for name, color in ((OURS, p.RED), ("torch", p.BLUE)):
            lines += p.of_provider(list(zip(sizes, group)), name, color)
        axes = (f"M = {M}", "weights N·K", "milliseconds per call")
        panels.append(p.Panel(*axes, lines, xscale="log", yscale="log"))
    return panels
