"""``Slots``: which adapter has which pages, which is all that a plan has to know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .. import backends
from ..schema import ceil_div
from .plan import Plan


class Slots:
    """Named adapters in the pages of a pool: page ids that hold in every module, and no values."""

    def __init__(self, num_pages: int, page_rank: int, device: torch.device) -> None:
        self.num_pages, self.page_rank, self.device = num_pages, page_rank, device
        self.pool = backends.host_module().PagePool(num_pages)
        self.evictions = 0  # so that a plan sees at a glance that nothing has changed
        self._slots: dict[str, int] = {}
        self._max_rank: dict[int, int] = {}  # of each slot, in any module

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that are loaded."""
        return tuple(self._slots)

    @property
    def free_pages(self) -> int:
        return self.pool.free_pages

    def _take_pages(self, name: str, max_rank: int) -> tuple[int, list[int]]:
        needed = ceil_div(max_rank, self.page_rank)
        try:
            return self.pool.load(needed)
        except RuntimeError:
            raise RuntimeError(
                f"num_pages: {name!r} of rank {max_rank} needs {needed} pages of {self.page_rank} ranks, "
                f"{self.free_pages} of {self.num_pages} are free; evict an adapter, or make a larger bank"
            ) from None

    def _name_slot(self, name: str, slot: int, max_rank: int) -> None:
        self._slots[name], self._max_rank[slot] = slot, max_rank

    def slots(self, names: Iterable[str | None]) -> list[int]:
        """The slot of each adapter, -1 for None. Raises ValueError for a name that is not loaded."""
        try:
            return [-1 if name is None else self._slots[name] for name in names]
        except (KeyError, TypeError):
            unknown = next(
                n for n in names if not isinstance(n, str | None) or n not in self._slots
            )
            raise ValueError(
                f"names: expected loaded adapters, of {list(self._slots)}, or None, got {unknown!r}"
            ) from None

    def slot(self, name: str) -> int:
        """The slot of a loaded adapter. Raises ValueError for another name."""
        if name not in self._slots:
            raise ValueError(f"name: expected one of {list(self._slots)}, got {name!r}")
        return self._slots[name]

    def plan(
        self,
        names: Sequence[str | None],
        tokens_per_sequence: Sequence[int] | None = None,
        *,
        fixed: bool = False,
        max_rank: int | None = None,
    ) -> Plan:
        """The plan of a batch: which adapter each sequence has, for all layers of one step.

        Args:
            names: the adapter of each sequence, in the order of the batch; None: the base alone.
            tokens_per_sequence: how many rows each has, prefill and decode mixed as they come; padding counts.
                None: one each, a decode step.
            fixed: arrays of a size that depends on the number of rows alone, for :meth:`Plan.update` and CUDA
                graphs.
            max_rank: that such a plan must be able to take later; by default the largest loaded now.

        Raises ValueError for an unknown name, for numbers that do not fit, and for negative ones.
        """
        return Plan(self, names, tokens_per_sequence, fixed, max_rank)

    def largest_rank(self, slots: Iterable[int] | None = None) -> int:
        """Of the adapters in these slots, in any module; of all that are loaded where ``slots`` is None."""
        return max(
            self._max_rank.values() if slots is None else map(self._max_rank.get, slots), default=0
        )
