"""Many adapters in one batch on stacks of experts: each row meets one expert, and there the adapter of its token.

An adapter has a part for every expert. Page p of a stack is E pages, one for each expert: page ``p E + e`` of A and B,
so that the ids of pages are the same in all modules of a model. A pair of adapter u and expert e is a slot of its
own, ``u E + e``, and the rows of a call that share one make tiles, as in :class:`Plan`.

PEFT's A and B of a stack are no views of such pages. Where they are the model's own, the pages hold copies, which are
made again when the parameters have changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..arguments import PlanArgs, ceil_div
from ..formats import Weight4bit
from ..functional import wants_grad
from ..grouped import grouped_linear_4bit
from ..schema import ops
from .functional import _MultiLoRA
from .pages import ModulePages, Owner
from .plan import PageTable, Plan

_TILE_ROWS = 16


class StackPages(ModulePages):
    """The pages of one stack of experts: those of :class:`ModulePages`, one for every expert.

    ``A [pages E, page_rank, K]`` and ``B [pages E, page_rank, N]``; tables by adapter and expert.
    """

    def __init__(
        self, table: PageTable, experts: int, N: int, K: int, owner: Owner | None = None
    ) -> None:
        self.experts = experts
        super().__init__(table, N, K, owner, parts=experts)
        self.own: dict[int, range] = {}  # by slot: the pages of the owner's adapters
        self._copied: dict[int, tuple] = {}  # by slot: which parameters, and their versions

    @torch.no_grad()
    def fill(self, pages: Sequence[int], A: torch.Tensor, B: torch.Tensor) -> None:
        """Copies an adapter, A ``[r E, K]`` and B ``[N, r E]`` in PEFT's order, into ``pages``."""
        E, (N, K) = self.experts, self.shape
        rank, page_rank = A.shape[0] // E, self.table.page_rank
        a, b = A.view(E, rank, K), B.view(N, rank, E).permute(2, 1, 0)
        for i in range(ceil_div(rank, page_rank)):
            ranks = slice(i * page_rank, min(rank, (i + 1) * page_rank))
            own = slice(pages[i] * E, (pages[i] + 1) * E)
            count = ranks.stop - ranks.start
            self.A[own, :count].copy_(a[:, ranks])
            self.B[own, :count].copy_(b[:, ranks])

    # -- copies of the owner's adapters ------------------------------------------------------------

    def adopt(self, slot: int, first_page: int) -> None:
        """Has the pages from ``first_page`` on hold the owner's adapter of ``slot``.

        Raises as :meth:`check_fits`.
        """
        pages = ceil_div(self.rank(slot), self.table.page_rank)
        self.own[slot] = range(first_page, first_page + pages)
        self._copy(slot)

    def release(self, slot: int) -> None:
        self.own.pop(slot, None)
        self._copied.pop(slot, None)

    def _copy(self, slot: int) -> tuple[nn.Parameter, nn.Parameter]:
        A, B = self.owner.adapter(slot)
        self.check_fits(slot, A, B)
        self.fill(self.own[slot], A, B)
        if self._copied.get(slot) != (now := _versions(A, B)):
            self.moves[slot] = self.moves.get(slot, 0) + 1
            self._copied[slot] = now
        return A, B

    def refresh(self, plan: Plan) -> None:
        # Whatever the versions say: `parameter.data` may be written without a trace.
        for slot in plan.slots:
            if slot in self.own:
                self._copy(slot)

    def parameters(self, plan: Plan) -> tuple[list[int], list[nn.Parameter]]:
        """Slots of the plan's adapters that are the owner's, and A and B of each; none where no gradients are recorded.

        Those that have changed since the last time are copied again. Raises RuntimeError if they do not fit.
        """
        slots: list[int] = []
        parameters: list[nn.Parameter] = []
        for slot in plan.slots:
            if slot not in self.own:
                continue
            A, B = self.owner.adapter(slot)
            if not torch.compiler.is_compiling() and self._copied[slot] != _versions(A, B):
                self._copy(slot)
            slots.append(slot)
            parameters += A, B
        return (slots, parameters) if torch.is_grad_enabled() else ([], [])

    def gradients(
        self, slot: int, first: int, dA: torch.Tensor, dB: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        E, r, (N, _) = self.experts, self.rank(slot), self.shape
        rows = slice(first, first + r * E)
        return dA[rows], dB[rows].view(E, r, N).permute(2, 1, 0).reshape(N, r * E)


def _versions(A: nn.Parameter, B: nn.Parameter) -> tuple:
    return tuple((id(part), part.data_ptr(), part._version) for part in (A, B))


class _OfCall:
    """The plan of one call of a stack, for the functions that take a plan of a batch."""

    def __init__(self, plan: Plan, args: PlanArgs) -> None:
        self.plan, self.args = plan, args

    @property
    def version(self) -> int:
        return self.plan.version

    def check_current(self) -> None:
        self.plan.check_current()


def plan_of_call(
    plan: PlanArgs, pages: StackPages, offsets: torch.Tensor, tokens: torch.Tensor
) -> PlanArgs:
    """Which row of a call has which adapter of which expert.

    Args:
        plan: of the batch: which token has which adapter.
        offsets: int32 ``[E]``, see :func:`grouped_linear_4bit`.
        tokens: int64 ``[M]``: the token of each row.
    """
    E, M, device = pages.experts, tokens.shape[0], tokens.device
    tile_of_token, tiles = plan.tile_of_row.cpu(), plan.tiles.cpu().view(-1, 4).long()
    expert = torch.searchsorted(offsets.cpu().long(), torch.arange(M), right=True)
    tile = tile_of_token[tokens.cpu()].long()
    slot = torch.where(tile >= 0, tiles[tile.clamp(min=0), 0], -1) if len(tiles) else tile
    ranks = pages.op_args()[2].cpu().long()
    has = (slot >= 0) & (expert < E)
    pair = torch.where(has, slot * E + expert, -1)
    has &= torch.where(has, ranks[pair.clamp(min=0)], 0) > 0
    rows = has.nonzero()[:, 0]
    rows = rows[torch.sort(pair[rows], stable=True)[1]]
    pairs, counts = torch.unique_consecutive(pair[rows], return_counts=True)
    # Pages: those of the adapter in the batch's plan, for this expert.
    first_page = torch.zeros(len(ranks) // E, dtype=torch.int64)
    first_page[tiles[:, 0]] = tiles[:, 3]
    used = ceil_div_of(ranks[pairs], pages.table.page_rank)
    starts = used.cumsum(0) - used
    of_page = torch.repeat_interleave(torch.arange(len(pairs)), used)
    place = torch.arange(len(of_page)) - starts[of_page]
    ids = plan.page_ids.cpu().long()[first_page[pairs[of_page] // E] + place]
    page_ids = ids * E + pairs[of_page] % E
    # Tiles of up to so many rows.
    per_pair = ceil_div_of(counts, _TILE_ROWS)
    of_tile = torch.repeat_interleave(torch.arange(len(pairs)), per_pair)
    within = (torch.arange(len(of_tile)) - (per_pair.cumsum(0) - per_pair)[of_tile]) * _TILE_ROWS
    row0 = (counts.cumsum(0) - counts)[of_tile] + within
    height = torch.clamp(counts[of_tile] - within, max=_TILE_ROWS)
    table = torch.stack((pairs[of_tile], row0, height, starts[of_tile]), 1)
    tile_of_row = torch.full((M,), -1, dtype=torch.int64)
    tile_of_row[rows] = torch.repeat_interleave(torch.arange(len(of_tile)), height)
    made = (t.to(device=device, dtype=torch.int32) for t in (table, page_ids, tile_of_row, rows))
    return PlanArgs(*made, _TILE_ROWS, plan.max_rank)


def ceil_div_of(values: torch.Tensor, by: int) -> torch.Tensor:
    return (values + by - 1) // by


def multi_grouped(
    x: torch.Tensor,
    w: Weight4bit,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
    tokens: torch.Tensor,
    plan: Plan,
    pages: StackPages,
) -> torch.Tensor:
    """``y[m] = W_e x[m] + bias_e``, rounded, ``+ scaling_u B_ue A_ue x[m]`` for row m of expert e and adapter u.

    Differentiable in x, bias and those parameters of the model's own adapters in the bank that require a gradient.
    """
    y = grouped_linear_4bit(x, w, offsets, bias, transposed)
    if plan.is_base_only or not pages.covers(plan):
        return y
    call = _OfCall(plan, plan_of_call(plan.args, pages, offsets, tokens))
    x = x.to(y.dtype)  # under autocast
    slots, parameters = pages.parameters(plan)
    if wants_grad(x, None, y, *parameters):
        read = call, pages, slots, plan.version, tuple(map(pages.moves.get, slots))
        return _MultiLoRA.apply(y, x, None, read, *parameters)
    ops.multi_lora_(y, x, *call.args, *pages.op_args(), None)
    return y
