"""What the tables of all operators are made of; numbers come from the JSON of a run."""

from __future__ import annotations

from lowrank_kernels.tables import digits

OURS = "lowrank_kernels"
INT8 = f"{OURS}, int8 activations"


def is_variant(name: str) -> bool:
    """Whether this is the library in another way than by itself, exact as ever: see variants.py."""
    return name.startswith(f"{OURS}, ") and name != INT8


def median(case: dict, provider: str) -> float | None:
    return case["providers"].get(provider, {}).get("median_ms")


def ratio(case: dict, peer: str | None) -> float | None:
    """How many times faster than ``peer`` this library is; None if one of them did not run."""
    ours, theirs = median(case, OURS), median(case, peer)
    return theirs / ours if ours and theirs else None


def of_limit(case: dict) -> str:
    ours = median(case, OURS)
    return f"{case['limit_ms'] / ours:.0%}" if ours else "-"


def cell(case: dict, name: str) -> str:
    """Milliseconds, on a GPU microseconds, and the spread; a star where no graph was used."""
    result = case["providers"].get(name, {})
    if "median_ms" not in result:
        return "failed" if "error" in result else "-"
    unit = 1e3 if case.get("device") == "cuda" else 1.0
    spread = (result["q3_ms"] - result["q1_ms"]) / 2 / result["median_ms"]
    star = "" if result.get("graph", True) else "*"
    return f"{digits(result['median_ms'] * unit)}{star} ±{spread:.0%}"


def markdown(table: list[list[str]]) -> str:
    head, *rows = (f"| {' | '.join(row)} |" for row in table)
    return "\n".join([head, "|" + " ---: |" * len(table[0]), *rows])


def plain(table: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join(
        "  " + "  ".join(c.rjust(w) for c, w in zip(row, widths)).rstrip() for row in table
    )
