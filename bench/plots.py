"""The picture of one machine's results, in docs/benchmarks."""

from __future__ import annotations

import pathlib

from lowrank_kernels.benchmark.ops import OURS
from lowrank_kernels.benchmark.report import groups, machine_of, median
from lowrank_kernels.cli import pictures as p

from . import peer_ggml, peer_int4, peer_openvino, report, suite

# (label, slow, fast, color): what is how many times faster than what
SPEEDUPS = (
    ("F.linear", "torch", OURS, p.BLUE),
    ("bitsandbytes", "bitsandbytes", OURS, p.AMBER),
    (peer_int4.ORT, peer_int4.ORT, OURS, p.GREY),
    (peer_openvino.NAME, peer_openvino.NAME, OURS, p.GREEN),
    (peer_ggml.NAME, peer_ggml.NAME, OURS, p.VIOLET),
    ("int8 activations against ggml's", peer_ggml.NAME, suite.INT8, p.VIOLET),
)


def speedup(document: dict, path: pathlib.Path) -> bool:
    """Draws linear_4bit of the first dtype with cold caches, a panel per shape; False where there are no such cases."""
    dtype, panels = next((c["dtype"] for c in document["cases"] if c["op"] != "model"), ""), []
    for (_, N, K, *rest), group in groups(document, ["linear_4bit"]).items():
        if rest == [dtype, "cold"]:
            axes = (f"W {N} x {K}", "tokens M", "times faster than")
            tokens = [case["M"] for case in group]
            panels.append(p.Panel(*axes, _lines(group, tokens), tokens, yscale="log"))
    if panels:
        where = f"{machine_of(document)}, {document['threads']} threads; {report.rates(document)}"
        words = f"How many times faster: y = x Wᵀ, {dtype}, cold caches\n{where.replace('*', '')}"
        p.draw(path, words, panels)
    return bool(panels)


def _lines(group: list[dict], tokens: list[int]) -> list[p.Line]:
    lines = [p.Line("", tokens, [1.0] * len(tokens), "-", "black")]
    for label, slow, fast, color in SPEEDUPS:
        pairs = [(c["M"], median(c, slow), median(c, fast)) for c in group]
        if points := [(M, a / b) for M, a, b in pairs if a and b]:
            style = "o--" if fast == suite.INT8 else "o-"
            lines.append(p.Line(label, *map(list, zip(*points)), style, color))
    return lines
