"""Tables on the screen, and numbers in them."""

from __future__ import annotations

from collections.abc import Sequence


def text(rows: Sequence[Sequence[str]], rules: Sequence[int] = (1,)) -> str:
    """Columns side by side, the first on the left and the others on the right; a rule above some rows."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    for index in sorted((i % len(lines) for i in rules), reverse=True):
        lines.insert(index, rule)
    return "\n".join(lines)


def digits(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def times_faster(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}x" if value >= 0.95 else f"{value:.2f}x"
