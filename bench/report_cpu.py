"""Tables that only a CPU's results have: this library against itself, and growth with the size."""

from __future__ import annotations

from lowrank_kernels.benchmark.case import Case

from . import report_targets, variants
from .tables import OURS, cell, is_variant, markdown, median, of_limit, plain

GROWTH = "linear_4bit_growth"
TITLES = {GROWTH: "Growth with the size of the weight: y = x Wᵀ, float32, cold caches"}


def _names(group: list[dict]) -> list[str]:
    return list(dict.fromkeys(n for case in group for n in case["providers"] if is_variant(n)))


def _variant_cell(document: dict, case: dict, name: str) -> str:
    theirs, ours = median(case, name), median(case, OURS)
    if not (theirs and ours):
        return "-"
    words = name.removeprefix(f"{OURS}, ")
    if "thread" in words:
        told = f"{theirs / ours:.2f}x"
    elif words in variants.SIXTEEN_BITS or name == variants.INVARIANT:
        told = f"{theirs / ours - 1:+.0%}"
    elif name == variants.BASE:
        told = f"the adapter adds {ours / theirs - 1:.0%}"
    else:
        told = f"{report_targets.share(document, case, words):.0%}"
    return f"{cell(case, name)} ({told})"


def variants_table(document: dict, group: list[dict]) -> list[list[str]]:
    """A row per M of the cases of one table; nothing where none has variants.

    In parentheses: what 16-bit activations and equal bits in every batch cost more, how many times
    faster all threads are than fewer, and for an instruction set that was forced the share of its limit.
    """
    names = _names(group)
    if not names:
        return []
    head = ["M", OURS, "of limit", *(name.removeprefix(f"{OURS}, ") for name in names)]
    rows = [
        [
            str(case["M"]),
            cell(case, OURS),
            of_limit(case),
            *(_variant_cell(document, case, name) for name in names),
        ]
        for case in sorted(group, key=lambda case: case["M"])
    ]
    return [head, *rows]


def growth(document: dict) -> dict[int, list[dict]]:
    """M -> its cases, from the smallest weight to the largest."""
    found: dict[int, list[dict]] = {}
    for case in sorted(document["cases"], key=lambda case: case["N"] * case["K"]):
        if case["op"] == GROWTH:
            found.setdefault(case["M"], []).append(case)
    return dict(sorted(found.items()))


def growth_table(document: dict) -> list[list[str]]:
    """A row per M and size; what of it all takes turns, so that a reader sees how cold it is."""
    rows = [
        ["M", "W", OURS, "torch", "of limit", "limit", "ns / 1000 weights", "4-bit MiB in turn"]
    ]
    for M, cases in growth(document).items():
        for case in cases:
            N, K = case["N"], case["K"]
            ours = case["providers"].get(OURS, {})
            weights = ours.get("copies", 0) * Case("", N, K, M).weight_bytes / 2**20
            spent = f"{ours['median_ms'] * 1e9 / (N * K):.3g}" if "median_ms" in ours else "-"
            row = [str(M), f"{N} x {K}", cell(case, OURS), cell(case, "torch"), of_limit(case)]
            rows.append([*row, f"{case['limit_ms']:.3g}", spent, f"{weights:.0f}"])
    return rows if len(rows) > 1 else []


def text(document: dict) -> list[str]:
    table = growth_table(document)
    return ["", TITLES[GROWTH], plain(table)] if table else []


def section(document: dict, plot: str | None) -> list[str]:
    """The growth; nothing where it was not measured."""
    table = growth_table(document)
    if not table:
        return []
    lines = ["", f"### {TITLES[GROWTH]}", "", "Milliseconds; the weights of a case take turns."]
    if plot:
        lines += ["", f"![Time against the number of weights, and against threads]({plot})"]
    return [*lines, "", markdown(table)]
