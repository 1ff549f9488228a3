"""``Plan``: which row of a batch has which adapter; ``PageTable``: which adapter has which pages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from .. import backends
from ..arguments import PlanArgs, ceil_div
from .in_force import entered, in_force

# Of plans that must fit any later batch: decode steps have few rows per adapter.
_FIXED_TILE_ROWS = 16


class Plan:
    """Which row of a batch has which adapter: made once a step by :meth:`AdapterBank.plan`, used by all layers.

    ``names``: the adapter of each sequence, or None; ``tokens_per_sequence``: how many rows each has, in the
    order of the batch; ``tokens``: their sum M. A plan names pages, so it holds until one of its adapters is
    evicted. Which x layers take under it: :meth:`for_shape`.
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
        # The arguments PLAN of the operators (see schema.py).
        self.args = PlanArgs(*self._views(), self.tile_rows, self.max_rank)
        self._step: Plan | None = None
        self.version = 0  # how often it was updated
        self._uses: list[Use] = []

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
        slots, plan = self.bank.slots(names), backends.host_module().plan
        arrays = plan(self.bank.pool, slots, tokens, **limits)
        if not self.fixed and 1 in (arrays.tile_count, arrays.page_count, arrays.row_count):
            # torch.compile makes code of its own for every size that is 1, so none is.
            limits = {
                "tile_capacity": max(2, arrays.tile_count),
                "page_capacity": max(2, arrays.page_count),
                "tile_rows": arrays.tile_rows,
            }
            arrays = plan(self.bank.pool, slots, tokens, **limits)
        self._arrays = arrays
        self.names, self.tokens_per_sequence = names, tokens
        self.tokens: int = self._arrays.M
        # Those that have rows, and what was loaded there: a slot may be another adapter's later.
        self.slots: list[int] = self._arrays.slots
        self.generations: list[int] = self._arrays.generations
        self._evictions = self.bank.evictions
        # No row has an adapter, nor can one have later.
        self.is_base_only: bool = not self.slots and not self.fixed

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
        if self._uses:
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
        self.version += 1

    def op_args(self) -> tuple:
        """The arguments PLAN of the operators (see schema.py)."""
        return self.args

    def for_shape(self, shape: torch.Size) -> Plan:
        """The plan for the rows of an x ``[..., K]`` of this shape.

        It is this plan where x has M rows, all tokens in their order. An x ``[sequences, 1, K]`` is one row of each
        sequence, a decode step that follows a prefill, which needs no plan of its own. Nothing else says whose its
        rows are: a matrix of as many rows as there are sequences may be any rows, those of an expert, say.

        Raises ValueError for any other shape.
        """
        rows = shape[:-1].numel()
        # self.tokens, but torch.compile takes the size of a tensor as it comes.
        if rows == self.args.tile_of_row.shape[0]:
            return self
        sequences = len(self.names)
        if len(shape) < 3 or not rows == shape[0] == sequences:
            raise ValueError(
                f"x: expected {self.tokens} rows, the tokens of the plan, or shape [{sequences}, 1, K], one row of "
                f"each of its sequences, got {rows} rows, shape {tuple(shape)}; for a layer that sees one row of "
                "each sequence as a matrix, or other rows, make the plan of just these: bank.plan(names, "
                "tokens_per_sequence)"
            )
        if self._step is None:
            self._step = self.bank.plan(self.names)
        return self._step

    def for_tokens(self, tokens: int) -> Plan:
        """The plan for a layer of experts that gets a matrix of so many tokens.

        It is this plan where they are its tokens. One token of each sequence is a decode step only where a layer before
        has seen that step in its shape: see :meth:`for_shape`.

        Raises ValueError for any other number.
        """
        if tokens == self.args.tile_of_row.shape[0]:
            return self
        if tokens == len(self.names) and self._step is not None:
            return self._step
        raise ValueError(
            f"x: expected {self.tokens} rows, the tokens of the plan, in a layer of experts, got {tokens}; "
            "make a plan of just these: bank.plan(names, tokens_per_sequence)"
        )

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the block, in this context, the plan is in force and its adapters cannot be evicted.

        Raises RuntimeError if one of them has been evicted.
        """
        self.check_current()
        use, slots = Use(self), self.slots
        self.bank.pool.pin(slots, self.generations)
        self._uses.append(use)
        try:
            with entered(use):
                yield
        finally:
            use.ended = True
            self._uses.remove(use)
            self.bank.pool.unpin(slots)

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


class Use:
    """One block with a plan in force (see in_force.py)."""

    records = False

    def __init__(self, plan: Plan) -> None:
        self.plan, self.pages, self.ended = plan, plan.bank.pages_of_layer, False


def active() -> Plan | None:
    """The plan of the innermost block of this context, of whichever bank."""
    return next((e.plan for e in reversed(in_force.entries) if isinstance(e, Use)), None)


class PageTable:
    """Named adapters in the pages of a pool: page ids that hold in every module, and no values."""

    def __init__(self, num_pages: int, page_rank: int, device: torch.device) -> None:
        self.num_pages, self.page_rank, self.device = num_pages, page_rank, device
        self.pool = backends.host_module().PagePool(num_pages)
        self.evictions = 0  # so that a plan sees at a glance that nothing has changed
        self.pages_of_layer: dict[int, Any] = {}  # the ModulePages of layers, by their id
        self._slots: dict[str, int] = {}
        self._max_rank: dict[int, int] = {}  # of each slot, in any module

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that are loaded."""
        return tuple(self._slots)

    @property
    def free_pages(self) -> int:
        return self.pool.free_pages

    def take_pages(self, name: str, max_rank: int, adjacent: bool = False) -> tuple[int, list[int]]:
        """A new slot and its pages, one after another in memory where they are ``adjacent``."""
        needed = ceil_div(max_rank, self.page_rank)
        try:
            return self.pool.load(needed, adjacent)
        except RuntimeError:
            how = "adjacent pages" if adjacent else "pages"
            none = ", but not side by side" if needed <= self.free_pages else ""
            raise RuntimeError(
                f"num_pages: {name!r} of rank {max_rank} needs {needed} {how} of {self.page_rank} ranks, "
                f"{self.free_pages} of {self.num_pages} are free{none}; evict an adapter, or make a larger bank"
            ) from None

    def name_slot(self, name: str, slot: int, max_rank: int) -> None:
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
