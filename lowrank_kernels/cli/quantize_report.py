"""What ``quantize`` did, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import math
import resource
from collections.abc import Iterator

from tabulate import SEPARATING_LINE, tabulate

from ..dense_layers import SkippedLayer

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class QuantizedLayer:
    """One row of the report: a layer, or a stack of experts.

    ``error``: |W - W4| / |W| in the Frobenius norm, where it was asked for.
    """

    name: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    error: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """The layers and other files of a model, and what became of them; bytes and seconds of the whole.

    ``str``: as ReplaceReport's.
    """

    quantized: list[QuantizedLayer]
    skipped: list[SkippedLayer]
    not_copied: list[SkippedLayer]
    bytes_before: int
    bytes_after: int
    seconds: float

    @property
    def peak_memory_bytes(self) -> int:
        """Of this process, until now."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def document(self) -> dict:
        return dataclasses.asdict(self) | {"peak_memory_bytes": self.peak_memory_bytes}

    def summary(self) -> str:
        return (
            f"{self.bytes_before / MIB:.1f} MiB -> {self.bytes_after / MIB:.1f} MiB, {self.seconds:.1f} s, "
            f"peak memory {self.peak_memory_bytes / MIB:.0f} MiB"
        )

    def __str__(self) -> str:
        left = [f"{file.name}  {file.reason}" for file in self.not_copied]
        head = [f"\nnot copied: {len(left)}"] if left else []
        return "\n".join([_table(self.quantized), *_grouped(self.skipped), *head, *left])


def _table(rows: list[QuantizedLayer]) -> str:
    with_errors = rows[0].error is not None

    def cells(name, shape, before, after, bits, error):
        numbers = (f"{before / MIB:.3f}", f"{after / MIB:.3f}", f"{bits:.3f}")
        return (name, shape, *numbers, *([f"{error:.2%}"] if with_errors else []))

    head = ("quantized", "shape", "before MiB", "after MiB", "bits/weight")
    lines = [(*head, *(["error"] if with_errors else []))]
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        sizes = row.bytes_before, row.bytes_after, row.bits_per_weight
        lines.append(cells(row.name, shape, *sizes, row.error))
    elements = [math.prod(row.shape) for row in rows]

    def mean(values: list[float]) -> float:
        return sum(n * v for n, v in zip(elements, values)) / max(1, sum(elements))

    sizes = sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)
    error = mean([row.error for row in rows]) if with_errors else None
    bits = mean([row.bits_per_weight for row in rows])
    lines.append(cells("total", f"{len(rows)} layers", *sizes, bits, error))
    lines.insert(-1, SEPARATING_LINE)
    look = {"disable_numparse": True, "stralign": "right", "colalign": ("left",)}
    return tabulate(lines, headers="firstrow", **look)


def _grouped(skipped: list[SkippedLayer]) -> Iterator[str]:
    """A line for each kind of layer, numbers in names left out: models have many experts."""
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in skipped:
        words = ["*" if word.isdigit() else word for word in layer.name.split(".")]
        groups.setdefault((".".join(words), layer.reason), []).append(layer.name)
    if groups:
        yield f"\nleft dense: {len(skipped)}"
    for (name, why), members in groups.items():
        one = len(members) == 1
        yield f"{members[0]}  {why}" if one else f"{name} ({len(members)})  {why}"
