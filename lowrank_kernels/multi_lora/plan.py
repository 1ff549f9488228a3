"""``Plan``: which row of a batch has which adapter; and the plan that is in force."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .. import backends
from ..schema import ceil_div

# Of plans that must fit any later batch: decode steps have few rows per adapter.
_FIXED_TILE_ROWS = 16
_active: Plan | None = None  # set by AdapterBank.using, for the whole process


def active() -> Plan | None:
    """The plan in force: that of the innermost :meth:`AdapterBank.using`."""
    return _active


def set_active(plan: Plan | None) -> None:
    global _active
    _active = plan


class Plan:
    """Which row of a batch has which adapter: made once a step by :meth:`AdapterBank.plan`, used by all layers.

    ``names``: the adapter of each sequence, or None; ``tokens_per_sequence``: how many rows each has, in the
    order of the batch; ``tokens``: their sum M. A plan names pages, so it holds until one of its adapters is
    evicted. Layers take M rows under it, or one row per sequence: the decode steps that follow a prefill
    need no plan of their own.
    """

    def __init__(
        self,
        bank: PageTable,
        names: Sequence[str | None],
        tokens_per_sequence: Sequence[int] | None,
        fixed: bool,
        max_rank: int | None,
    ) -> None:
        """See :meth:`AdapterBank.plan`."""
        self.bank, self.fixed = bank, fixed
        self._build(names, tokens_per_sequence)
        self.tile_rows: int = self._arrays.tile_rows
        largest = bank.largest_rank(None if fixed else self.slots)
        if max_rank is not None and (type(max_rank) is not int or max_rank < largest):
            raise ValueError(f"max_rank: expected an integer >= {largest}, got {max_rank!r}")
        self.max_rank: int = largest if max_rank is None else max_rank
        self._buffer = torch.from_numpy(self._arrays.buffer).to(bank.device, copy=fixed)
        self._args = (*self._views(), self.tile_rows, self.max_rank)
        self._step: Plan | None = None

    def _build(self, names: Sequence[str | None], tokens: Sequence[int] | None) -> None:
        names = tuple(names)
        tokens = (1,) * len(names) if tokens is None else tuple(tokens)
        if len(tokens) != len(names):
            raise ValueError(
                f"tokens_per_sequence: expected one number per name, {len(names)}, got {len(tokens)}"
            )
        limits = {}
        if self.fixed:  # each tile has a row at least, and each page one adapter at most
            limits = {
                "tile_capacity": max(1, sum(tokens)),
                "page_capacity": self.bank.num_pages,
                "tile_rows": _FIXED_TILE_ROWS,
            }
        slots = self.bank.slots(names)
        self._arrays = backends.host_module().plan(self.bank.pool, slots, tokens, **limits)
        self.names, self.tokens_per_sequence = names, tokens
        self.tokens: int = self._arrays.M
        # Those that have rows, and what was loaded there: a slot may be another adapter's later.
        self.slots: list[int] = self._arrays.slots
        self.generations: list[int] = self._arrays.generations
        self._evictions = self.bank.evictions

    def _views(self) -> list[torch.Tensor]:
        a = self._arrays
        shapes = [part.shape for part in (a.tiles, a.page_ids, a.tile_of_row, a.rows)]
        return [
            self._buffer[start : start + torch.Size(shape).numel()].view(shape)
            for start, shape in zip(a.offsets, shapes, strict=True)
        ]

    def update(
        self, names: Sequence[str | None], tokens_per_sequence: Sequence[int] | None = None
    ) -> None:
        """Another batch of as many rows, in the same memory: what a captured CUDA graph then runs.

        Raises ValueError for a plan that is not ``fixed``, for another number of rows and for adapters beyond
        ``max_rank``, RuntimeError while the plan is in use; the plan is as it was.
        """
        if not self.fixed:
            raise ValueError("update: expected a plan made with fixed=True")
        if active() is self:
            raise RuntimeError(
                "update: the plan is in use; leave its `with bank.using(plan)` first"
            )
        new = Plan(self.bank, names, tokens_per_sequence, True, None)
        if new.tokens != self.tokens:
            raise ValueError(
                f"tokens_per_sequence: expected {self.tokens} rows in all, got {new.tokens}"
            )
        largest = self.bank.largest_rank(new.slots)
        if largest > self.max_rank:
            raise ValueError(
                f"names: expected adapters up to this plan's max_rank = {self.max_rank}, got {largest}"
            )
        self._buffer.copy_(new._buffer)
        self._arrays, self._step = new._arrays, None
        self.names, self.tokens_per_sequence = new.names, new.tokens_per_sequence
        self.slots, self.generations = new.slots, new.generations
        self._evictions = new._evictions

    def op_args(self) -> tuple:
        """The arguments PLAN of the operators (see schema.py)."""
        return self._args

    @property
    def is_base_only(self) -> bool:
        """No row has an adapter, nor can one have later."""
        return not self.slots and not self.fixed

    def for_rows(self, rows: int) -> Plan:
        """This plan for its M rows; for one row per sequence the plan of a decode step.

        Raises ValueError for any other number.
        """
        # self.tokens, but torch.compile takes the size of a tensor as it comes.
        tile_of_row = self._args[2]
        if rows == tile_of_row.shape[0]:
            return self
        if rows != len(self.names):
            raise ValueError(
                f"x: expected {self.tokens} rows, the tokens of the plan, or {len(self.names)}, one for "
                f"each of its sequences, got {rows}"
            )
        if self._step is None:
            self._step = self.bank.plan(self.names)
        return self._step

    def check_current(self) -> None:
        """Raises RuntimeError if an adapter of the plan has been evicted since it was made."""
        if self._evictions == self.bank.evictions:
            return
        try:
            self.bank.pool.pin(self.slots, self.generations)
        except RuntimeError:
            raise RuntimeError(
                f"plan: expected its adapters to be loaded still, of {sorted(set(self.names) - {None})} "
                "one has been evicted since the plan was made; make another plan"
            ) from None
        self.bank.pool.unpin(self.slots)
        self._evictions = self.bank.evictions

    def __repr__(self) -> str:
        adapters = len({name for name in self.names if name is not None})
        return f"Plan({len(self.names)} sequences, {self.tokens} tokens, {adapters} adapters)"


class PageTable:
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
