"""The plots of demo and bench, and of the suite in bench/: lines over something, side by side. Bars are quartiles."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib

from .. import files
from ..benchmark import report
from ..benchmark.ops import OURS

RED, BLUE, AMBER, GREY = "#c8102e", "#4a6fa5", "#e0a030", "#a3a3a3"
GREEN, VIOLET = "#6f9f5f", "#8a5fa0"
# By how a provider's name begins; others take the rest in turn.
COLORS = {OURS: RED, "torch": BLUE, "bitsandbytes": AMBER, "dequantize": GREY}


@dataclasses.dataclass
class Line:
    """``spread``: the quartiles of each y, where there are any."""

    label: str
    x: list
    y: list[float]
    style: str = "o-"
    color: str | None = None
    spread: list[tuple[float, float]] | None = None


@dataclasses.dataclass
class Panel:
    """Lines with one pair of axes; ``over``: the numbers that its x axis has, for one that doubles."""

    title: str
    xlabel: str
    ylabel: str
    lines: list[Line]
    over: list[int] | None = None
    yscale: str = "linear"


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _figure(title: str, panels: int, width: float, height: float):
    """A figure with axes side by side, at most four in a row."""
    columns = min(4, panels)
    rows = -(-panels // columns)
    figure, axes = _pyplot().subplots(
        rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False
    )
    figure.suptitle(title, fontsize=10)
    for axis in axes.flat[panels:]:
        axis.remove()
    for axis in axes.flat[:panels]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat[:panels])


def _save(figure, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.written(path) as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    _pyplot().close(figure)


def draw(path: pathlib.Path, title: str, panels: list[Panel], width: float = 5.5) -> None:
    """The panels in one picture, written whole or not at all."""
    figure, axes = _figure(title, len(panels), width, 4.4)
    for axis, panel in zip(axes, panels):
        axis.set(xlabel=panel.xlabel, ylabel=panel.ylabel, yscale=panel.yscale)
        axis.set_title(panel.title, fontsize=11)
        axis.grid(alpha=0.25, which="both", linewidth=0.5)
        if panel.over:
            axis.set_xscale("log", base=2)
            axis.set_xticks(panel.over, [str(m) for m in panel.over])
        if panel.yscale == "log":  # numbers as people write them
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in "25" else "")
        for line in panel.lines:
            look = {"color": line.color, "linewidth": 2.4 if line.color == RED else 1.4}
            axis.plot(line.x, line.y, line.style, label=line.label, markersize=4, **look)
            if line.spread:
                axis.vlines(line.x, *zip(*line.spread), **look)
        if panel.yscale == "linear":
            axis.set_ylim(bottom=0)
        if panel.lines:
            axis.legend(frameon=False, fontsize=9)
    _save(figure, path)


# -- results ---------------------------------------------------------------------------------------


def of_provider(
    points: list[tuple[float, dict]], name: str, color: str | None = None
) -> list[Line]:
    """The line of a provider through (x, case); none where it did not run."""
    points = [(x, case["providers"].get(name, {})) for x, case in points]
    points = [(x, result) for x, result in points if "median_ms" in result]
    if not points:
        return []
    spread = [(result["q1_ms"], result["q3_ms"]) for _, result in points]
    medians = [result["median_ms"] for _, result in points]
    return [Line(name, [x for x, _ in points], medians, color=color, spread=spread)]


def colored(names: list[str]) -> dict[str, str]:
    """A color for each provider."""
    others = itertools.cycle((GREEN, VIOLET, "#b5c99a", "#8a8a8a", "#7fb3d5"))
    found: dict[str, str] = {}
    for name in names:
        known = COLORS.get(name if name.startswith(OURS) else name.split()[0])
        found[name] = next(others) if known is None or known in found.values() else known
    return found


def over_rows(group: list[dict], title: str) -> Panel:
    """Milliseconds of each provider over M, and the limit of the machine where it is known."""
    group = sorted(group, key=lambda case: case["M"])
    M = [case["M"] for case in group]
    limits = [case["limit_ms"] for case in group if "limit_ms" in case]
    lines = [Line("limit", M, limits, "--", "black")] if limits else []
    for name, color in colored(report.names_of(group)).items():
        lines += of_provider(list(zip(M, group)), name, color)
    return Panel(title, "rows M", "milliseconds per call", lines, M, yscale="log")


def times(path: pathlib.Path, document: dict) -> None:
    """A panel per operator, shape and dtype of ``bench``; of a model, one per phase."""
    if document["cases"][0]["op"] == "model":
        return speed(path, report.machine_of(document), report.rates(document))
    panels = [
        over_rows(group, f"{report.title(group)}\n{report.group_name(group)}".replace("`", ""))
        for group in report.groups(document).values()
    ]
    draw(path, f"{report.machine_of(document)}, {document['threads']} threads", panels)


# -- the demo's ------------------------------------------------------------------------------------


def loss(path: pathlib.Path, title: str, losses: list[float], held_out: dict[int, float]) -> None:
    """The loss of each training batch, and that of the held-out questions where it was measured."""
    steps, values = list(held_out), list(held_out.values())
    label = f"held-out questions: {values[0]:.2f} to {values[-1]:.2f}"
    lines = [
        Line("training batch", list(range(1, len(losses) + 1)), losses, "-", GREY),
        Line(label, steps, values, color=BLUE),
    ]
    draw(path, title, [Panel("", "step", "cross-entropy per response token", lines)], 7.5)


def speed(path: pathlib.Path, title: str, rates: dict[str, dict[str, float] | str]) -> None:
    """One panel per phase, one bar per model, tokens per second."""
    measured = {name: r for name, r in rates.items() if not isinstance(r, str)}
    phases = list(next(iter(measured.values())))
    figure, axes = _figure(title, len(phases), 3.4, 3.0)
    colors = colored(list(measured))
    for axis, phase in zip(axes, phases):
        values = [of_model.get(phase, 0.0) for of_model in measured.values()]
        bars = axis.barh(list(measured), values, color=list(colors.values()))
        axis.bar_label(bars, [report.digits(value) for value in values], padding=3)
        axis.set(title=phase, xlabel="tokens/s", xlim=(0, 1.2 * max(values)))
        axis.invert_yaxis()
        axis.tick_params(axis="y", length=0)
        if axis is not axes[0]:
            axis.set_yticklabels([])
    _save(figure, path)
