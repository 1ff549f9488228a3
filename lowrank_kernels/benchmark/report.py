"""Results in tables; every number comes from a result document, see :mod:`harness`."""

from __future__ import annotations

from collections.abc import Collection

from tabulate import tabulate

from .harness import failures
from .ops import OURS

TITLES = {
    "linear_4bit": "`linear_4bit`: y = x Wᵀ",
    "linear_4bit_dx": "`linear_4bit_dx`: dx = dy W",
    "lora_linear_4bit": "`lora_linear_4bit`, forward, r = {R}",
    "lora_linear_4bit_fwd_bwd": "`lora_linear_4bit`, forward and gradients of x, A, B, r = {R}",
    "multi_lora_linear_4bit": "`multi_lora_linear_4bit`: base and adapters, r = {R}",
    "experts": "`Experts4bit`: {experts} experts [2 x {N}, {K}] and [{K}, {N}], {top_k} a token",
    "experts_fwd_bwd": "`Experts4bit`, forward and gradients of x and of adapters on all experts, r = {R}",
    "quantize_4bit": "`quantize_4bit`: NF4 with double quantization",
    "dequantize_4bit": "`dequantize_4bit`",
    "model": "a whole model, tokens per second",
}
GPU_NAMES = {"torch": "cuBLAS"}  # what columns are called on a GPU

Rows = list[list[str]]


def plain(rows: Rows, left: int = 0) -> str:
    """A table for a terminal; the first ``left`` columns are on the left."""
    return _tabulated(rows, "simple", left)


def markdown(rows: Rows) -> str:
    return _tabulated(rows, "pipe", 0)


def _tabulated(rows: Rows, style: str, left: int) -> str:
    return tabulate(
        rows,
        headers="firstrow",
        tablefmt=style,
        disable_numparse=True,
        stralign="right",
        colalign=("left",) * left or None,
    )


# -- numbers ---------------------------------------------------------------------------------------


def digits(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def times_faster(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}x" if value >= 0.95 else f"{value:.2f}x"


def median(case: dict, name: str | None) -> float | None:
    return case["providers"].get(name, {}).get("median_ms")


def ratio(case: dict, peer: str | None, ours: str = OURS) -> float | None:
    """How many times faster than ``peer`` this library is; None if one of them did not run."""
    a, b = median(case, peer), median(case, ours)
    return a / b if a and b else None


def of_limit(case: dict) -> str:
    ours = median(case, OURS)
    return f"{case['limit_ms'] / ours:.0%}" if ours and "limit_ms" in case else "-"


def cell(case: dict, name: str) -> str:
    """Milliseconds, on a GPU microseconds, and the spread; a star where no graph was used. Of a model tokens/s."""
    result = case["providers"].get(name, {})
    if "median_ms" not in result:
        return "failed" if "error" in result else "-"
    value = result["median_ms"] * (1e3 if case["device"] == "cuda" else 1.0)
    value = result.get("tokens_per_second", value)
    spread = (result["q3_ms"] - result["q1_ms"]) / 2 / result["median_ms"]
    return f"{digits(value)}{'' if result.get('graph', True) else '*'} ±{spread:.0%}"


# -- tables ----------------------------------------------------------------------------------------


def groups(document: dict, ops: Collection[str] = TITLES) -> dict[tuple, list[dict]]:
    """Cases that differ in M alone, or in the phase of a model; in the order of ``ops``."""
    found: dict[tuple, list[dict]] = {}
    for case in document["cases"]:
        fields = ("model", "dtype") if case["op"] == "model" else ("N", "K", "dtype", "cache")
        if case["op"] in ops:
            key = (case["op"], *(case[field] for field in fields))
            found.setdefault(key, []).append(case)
    order = list(ops)
    return dict(sorted(found.items(), key=lambda item: order.index(item[0][0])))


def title(group: list[dict]) -> str:
    return TITLES[group[0]["op"]].format(**group[0])


def group_name(group: list[dict]) -> str:
    case = group[0]
    if case["op"] == "model":
        return f"{case['model']}, {case['dtype']}, r = {case['R']}"
    return f"W {case['N']} x {case['K']}, {case['dtype']}, {case['cache']} caches"


def table(group: list[dict], names: list[str], versus: Collection[str]) -> Rows:
    """A row per case: time of each provider, ratios of the first one to ``versus``, share of the limit."""
    first = group[0]
    called = GPU_NAMES if first["device"] == "cuda" else {}
    peers = [name for name in names[1:] if name in versus]
    with_limit = "limit_ms" in first and first["cache"] == "cold"
    key = "phase" if first["op"] == "model" else "M"
    head = [key] if first[key] else []
    head += [called.get(name, name) for name in names]
    head += [f"vs {called.get(name, name)}" for name in peers]
    head += ["of limit"] * with_limit
    rows = [head]
    for case in group if key == "phase" else sorted(group, key=lambda case: case["M"]):
        row = [str(case[key])] if case[key] else []
        row += [cell(case, name) for name in names]
        row += [times_faster(ratio(case, peer, names[0])) for peer in peers]
        row += [of_limit(case)] if with_limit else []
        rows.append(row)
    return rows


def names_of(group: list[dict]) -> list[str]:
    """The providers of any case of a table."""
    return list(dict.fromkeys(name for case in group for name in case["providers"]))


def machine_of(document: dict) -> str:
    where = f"{document['cpu']['model']}, {document['isa']}"
    return document["gpu"]["name"] if "gpu" in document else where


def text(document: dict) -> str:
    """All tables for a terminal, and why something is missing in them."""
    unit = "microseconds" if "gpu" in document else "milliseconds"
    lines = [
        f"{machine_of(document)}, {document['threads']} threads; "
        f"{unit}, median ± half the interquartile range"
    ]
    for group in groups(document).values():
        names = names_of(group)
        lines += ["", f"{title(group)}; {group_name(group)}", "", plain(table(group, names, names))]
    return "\n".join(lines + missing(document))


def missing(document: dict) -> list[str]:
    """What did not run, and why; of what failed also where, since no other case need fail."""
    reasons = {
        f"{name} did not run: {result['unavailable']}"
        for case in document["cases"]
        for name, result in case["providers"].items()
        if "unavailable" in result
    }
    found = sorted({*reasons, *failures(document)})
    return ["", *found] if found else []


def rates(document: dict) -> dict[str, dict[str, float] | str]:
    """name -> tokens per second in each phase of the model that was measured; a reason where there are none."""
    found: dict[str, dict[str, float] | str] = {}
    for case in document["cases"]:
        for name, result in case["providers"].items():
            if "tokens_per_second" in result:
                found.setdefault(name, {})[case["phase"]] = result["tokens_per_second"]
            else:
                found.setdefault(name, result.get("unavailable") or result["error"])
    return found
