"""The plots of demo and bench. Each is written beside its destination and renamed."""

from __future__ import annotations

import itertools
import os
import pathlib

RED, BLUE, AMBER, GREY = "#c8102e", "#4a6fa5", "#e0a030", "#8a8a8a"
GREEN, VIOLET = "#6f9f5f", "#8a5fa0"
COLORS = {"lowrank_kernels": RED, "bitsandbytes + PEFT": AMBER, "dense float32 + PEFT": BLUE}


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure, path: pathlib.Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(temporary, format="png", dpi=140)
    _pyplot().close(figure)
    os.replace(temporary, path)


def loss(path: pathlib.Path, title: str, losses: list[float], held_out: dict[int, float]) -> None:
    """The loss of each training batch, and that of the held-out questions where it was measured."""
    figure, axis = _pyplot().subplots(figsize=(7.5, 4.2), layout="constrained")
    axis.plot(range(1, len(losses) + 1), losses, color=RED, alpha=0.55, label="training batch")
    axis.plot(
        held_out.keys(),
        held_out.values(),
        "o-",
        color=BLUE,
        linewidth=2.2,
        label="held-out questions",
    )
    first, last = min(held_out.items()), max(held_out.items())
    for (step, value), side in ((first, (8, 4)), (last, (-4, 10))):
        axis.annotate(
            f"{value:.2f}", (step, value), xytext=side, textcoords="offset points", color=BLUE
        )
    axis.set(title=title, xlabel="step", ylabel="cross-entropy per response token")
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.legend(frameon=False)
    _save(figure, path)


def speed(path: pathlib.Path, title: str, rates: dict[str, dict[str, float] | str]) -> None:
    """One panel per measure, one bar per model, tokens per second."""
    measured = {name: r for name, r in rates.items() if not isinstance(r, str)}
    measures = list(next(iter(measured.values())))
    figure, axes = _pyplot().subplots(1, len(measures), figsize=(10, 3.0), layout="constrained")
    names = list(measured)
    for axis, measure in zip(axes, measures):
        values = [measured[name][measure] for name in names]
        bars = axis.barh(names, values, color=[COLORS.get(name, GREY) for name in names])
        axis.bar_label(bars, fmt="{:.3g}", padding=3)
        axis.set(title=measure, xlabel="tokens/s", xlim=(0, 1.2 * max(values)))
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        if axis is not axes[0]:
            axis.set_yticklabels([])
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def times(path: pathlib.Path, document: dict, titles: dict[str, str]) -> None:
    """One panel per operator, shape and dtype of ``bench``: milliseconds over M; bars are quartiles."""
    from .bench import groups

    panels = groups(document)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = _pyplot().subplots(
        rows, columns, figsize=(5.2 * columns, 4.2 * rows), layout="constrained", squeeze=False
    )
    others = itertools.cycle((BLUE, AMBER, GREY, GREEN, VIOLET))
    colors: dict[str, str] = {}
    for axis, ((name, N, K, dtype), cases) in zip(axes.flat, panels.items()):
        for provider in cases[0]["providers"]:
            if provider not in colors:
                colors[provider] = next(others) if colors else RED
            points = [(c["M"], c["providers"][provider]) for c in cases]
            points = sorted((m, r["median_ms"], r) for m, r in points if "median_ms" in r)
            if points:
                ms, medians, results = zip(*points)
                low = [median - r["q1_ms"] for median, r in zip(medians, results)]
                high = [r["q3_ms"] - median for median, r in zip(medians, results)]
                axis.errorbar(
                    ms, medians, (low, high), fmt="o-", color=colors[provider], label=provider
                )
        axis.set(xlabel="rows M", ylabel="ms", xscale="log", yscale="log")
        rows_of_x = sorted({c["M"] for c in cases})
        axis.set_xticks(rows_of_x, [str(m) for m in rows_of_x])
        axis.minorticks_off()
        axis.set_title(f"{titles[name]}\n{N} x {K}, {dtype}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.legend(frameon=False, fontsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    where = document.get("gpu") or f"{document['cpu']['model']}, {document['isa']}"
    figure.suptitle(f"{where}, {document['threads']} threads", fontsize=10)
    _save(figure, path)
