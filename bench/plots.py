"""The pictures of one machine's results, in docs/benchmarks. Bars are quartiles."""

from __future__ import annotations

import os
import pathlib

from . import peer_ggml, peer_openvino, report_cpu, report_targets, variants
from .tables import INT8, OURS, median

PANELS = (
    ("linear_4bit", "y = x Wᵀ"),
    ("lora_linear_4bit_fwd_bwd", "LoRA forward + backward, r = 16"),
)
BLUE, GREY, AMBER, GREEN, VIOLET = "#4a6fa5", "#a3a3a3", "#e0a030", "#6f9f5f", "#8a5fa0"
COLORS = {
    OURS: "#c8102e",
    "torch": BLUE,
    "torch + PEFT": BLUE,
    "dequantize + matmul": GREY,
    "bitsandbytes": AMBER,
    "bitsandbytes + PEFT": AMBER,
    "bitsandbytes, training": GREY,
    "Unsloth's scheme": GREEN,
    "Unsloth's scheme, bitsandbytes": "#b5c99a",
    peer_openvino.NAME: GREEN,
    peer_ggml.NAME: VIOLET,
}
# (label, slow, fast): what is how many times faster than what
SPEEDUPS = (
    ("F.linear, float32", "torch", OURS),
    ("bitsandbytes", "bitsandbytes", OURS),
    ("bitsandbytes, training", "bitsandbytes, training", OURS),
    (peer_openvino.NAME, peer_openvino.NAME, OURS),
    (peer_ggml.NAME, peer_ggml.NAME, OURS),
    ("int8 activations against ggml's", peer_ggml.NAME, INT8),
)


def write(document: dict, folder: pathlib.Path, stem: str) -> dict[str, pathlib.Path]:
    """The pictures that ``document`` has the figures for: name -> file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if "gpu" in document:
        drawings = {"time": _time}
    else:
        drawings = {"speedup": _speedup, "limit": _limit}
        if report_cpu.growth(document):
            drawings["growth"] = _growth
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, draw in drawings.items():
        figure = draw(document, plt)
        paths[name] = folder / f"{stem}-{name}.png"
        temporary = folder / f".{paths[name].name}.{os.getpid()}"
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
        plt.close(figure)
        os.replace(temporary, paths[name])
    return paths


def _figure(plt, panels: int, title: str, width: float = 5.5):
    figure, axes = plt.subplots(
        1, panels, figsize=(width * panels, 4.4), layout="constrained", squeeze=False
    )
    figure.suptitle(title, fontsize=10)
    for axis in axes[0]:
        axis.grid(alpha=0.25, which="both", linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _by_tokens(axis, tokens: list[int], title: str, words: str) -> None:
    """An axis over the numbers of tokens."""
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("tokens M")
    axis.set_ylabel(words)
    axis.set_xscale("log", base=2)
    axis.set_xticks(tokens, [str(m) for m in tokens])


def _logarithmic(axis) -> None:
    """A logarithmic y axis with numbers as people write them."""
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in "25" else "")


def _cases(document: dict, op: str, shape: tuple[int, int]) -> list[dict]:
    """Cold cases of the first dtype, by M."""
    wanted = (op, *shape, document["cases"][0]["dtype"], "cold")
    fields = ("op", "N", "K", "dtype", "cache")
    group = [c for c in document["cases"] if tuple(c[field] for field in fields) == wanted]
    return sorted(group, key=lambda case: case["M"])


def _shapes(document: dict, op: str) -> list[tuple[int, int]]:
    return list(dict.fromkeys((c["N"], c["K"]) for c in document["cases"] if c["op"] == op))


def _machine(document: dict) -> str:
    if "gpu" in document:
        return document["gpu"]["name"]
    words = f"{document['cpu']['model']}, {document['threads']} threads, {document['isa']}"
    limits = document["limits"]
    rates = f"reads {limits['read_gbs']:.1f} GB/s, sgemm {limits['sgemm_gflops']:.0f} GFLOP/s"
    return f"{words}; {rates}"


# -- a GPU: time per call --------------------------------------------------------------------------


def _time(document: dict, plt):
    """One panel per operator: first shape, first dtype, cold caches."""
    first, limits = document["cases"][0], document["limits"]
    rates = f"{limits['copy_gbs']:.0f} GB/s copy, {limits['matmul_tflops']:.0f} TFLOP/s"
    title = (
        f"W {first['N']} x {first['K']}, NF4 + double quantization, {first['dtype']}, cold caches; "
        f"{_machine(document)}\nlimit: {rates}"
    )
    figure, axes = _figure(plt, len(PANELS), title)
    for axis, (op, words) in zip(axes, PANELS):
        _times(axis, _cases(document, op, (first["N"], first["K"])), words)
    return figure


def _times(axis, group: list[dict], title: str) -> None:
    if not group:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center")
        return
    tokens = [case["M"] for case in group]
    _by_tokens(axis, tokens, title, "milliseconds per call")
    _logarithmic(axis)
    axis.plot(tokens, [c["limit_ms"] for c in group], "k--", linewidth=1.2, label="limit")
    for name in sorted(group[0]["providers"], key=lambda name: name != OURS):
        _line(axis, [(c["M"], c["providers"][name]) for c in group], name)
    axis.legend(frameon=False, fontsize=9)


def _line(axis, results: list[tuple[float, dict]], name: str) -> None:
    """Medians and quartiles of one provider, over whatever ``results`` have first."""
    points = [(x, r["median_ms"], r["q1_ms"], r["q3_ms"]) for x, r in results if "median_ms" in r]
    if not points:
        return
    x, middle, low, high = zip(*points)
    color, width = COLORS.get(name), 2.4 if name == OURS else 1.4
    axis.plot(x, middle, "o-", color=color, linewidth=width, markersize=4, label=name)
    axis.vlines(x, low, high, color=color, linewidth=width)


# -- a CPU: against others, against the limit, growth ----------------------------------------------


def _speedup(document: dict, plt):
    shapes = _shapes(document, "linear_4bit")
    title = f"How many times faster: y = x Wᵀ, float32, cold caches\n{_machine(document)}"
    figure, axes = _figure(plt, max(1, len(shapes)), title)
    for axis, shape in zip(axes, shapes):
        group = _cases(document, "linear_4bit", shape)
        tokens = [case["M"] for case in group]
        _by_tokens(axis, tokens, f"W {shape[0]} x {shape[1]}", "times faster than")
        _logarithmic(axis)
        axis.axhline(1, color="black", linewidth=1)
        for label, slow, fast in SPEEDUPS:
            pairs = [(c["M"], median(c, slow), median(c, fast)) for c in group]
            points = [(M, a / b) for M, a, b in pairs if a and b]
            if points:
                style = "o--" if fast == INT8 else "o-"
                axis.plot(*zip(*points), style, color=COLORS[slow], label=label, markersize=4)
        axis.legend(frameon=False, fontsize=9)
    return figure


def _limit(document: dict, plt):
    """Forward and dX at the first shape, for each instruction set, and what was aimed at."""
    shape = _shapes(document, "linear_4bit")[:1] or _shapes(document, "linear_4bit_dx")[:1]
    title = f"Share of the limit, float32, cold caches\n{_machine(document)}"
    figure, axes = _figure(plt, 2, title)
    for axis, op in zip(axes, (report_targets.FORWARD, report_targets.DX)):
        group = _cases(document, op, shape[0]) if shape else []
        words = report_targets.WORDS[op] + (f", W {shape[0][0]} x {shape[0][1]}" if shape else "")
        _by_tokens(axis, [case["M"] for case in group], words, "share of the limit")
        asked = report_targets.SHARES
        axis.plot(asked.keys(), asked.values(), "k_", markersize=16, label="asked")
        for isa, color in zip(report_targets.isas_of(document), (COLORS[OURS], AMBER, BLUE)):
            shares = [(c["M"], report_targets.share(document, c, isa)) for c in group]
            if points := [(M, value) for M, value in shares if value]:
                label = f"{isa}, its own limit" if isa == "avx2" else isa
                axis.plot(*zip(*points), "o-", color=color, label=label, markersize=4)
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, fontsize=9)
    return figure


def _growth(document: dict, plt):
    """A panel per M over the number of weights, and one over threads."""
    by_tokens = report_cpu.growth(document)
    title = f"Growth: y = x Wᵀ, float32, cold caches\n{_machine(document)}"
    figure, axes = _figure(plt, len(by_tokens) + 1, title, 4.2)
    for axis, (M, group) in zip(axes, by_tokens.items()):
        axis.set(title=f"M = {M}", xlabel="weights N·K", ylabel="milliseconds per call")
        axis.set_xscale("log")
        _logarithmic(axis)
        sizes = [case["N"] * case["K"] for case in group]
        axis.plot(sizes, [c["limit_ms"] for c in group], "k--", linewidth=1.2, label="limit")
        for name in (OURS, "torch"):
            _line(axis, [(n, c["providers"].get(name, {})) for n, c in zip(sizes, group)], name)
        axis.legend(frameon=False, fontsize=9)
    _by_threads(axes[-1], document)
    return figure


def _by_threads(axis, document: dict) -> None:
    """How many times faster more threads are than one, for each M."""
    counts = [*variants.counts_below(document["threads"]), document["threads"]]
    axis.set(title="threads", xlabel="threads", ylabel="times faster than 1 thread")
    axis.plot(counts, counts, "k--", linewidth=1.2, label="limit of arithmetic")
    axis.set_xticks(counts)
    shapes = _shapes(document, "linear_4bit")
    for case in _cases(document, "linear_4bit", shapes[0]) if shapes else []:
        one = median(case, variants.thread_name(1))
        times = [(n, median(case, variants.thread_name(n))) for n in counts[:-1]]
        times.append((counts[-1], median(case, OURS)))
        if points := [(n, one / ms) for n, ms in times if one and ms]:
            axis.plot(*zip(*points), "o-", label=f"M = {case['M']}", markersize=4)
    axis.legend(frameon=False, fontsize=9)
