"""Many adapters in one batch on stacks of experts: each row meets one expert, and there the adapter of its token.

An adapter has a part for every expert. Page p of a stack is E pages, one for each expert: page ``p E + e`` of A and B,
so that the ids of pages are the same in all modules of a model. A pair of adapter u and expert e is a slot of its
own, ``u E + e``, and the rows of a call that share one make tiles, as in :class:`Plan`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..arguments import PlanArgs, ceil_div
from ..formats import Weight4bit
from ..functional import wants_grad
from ..grouped import grouped_linear_4bit
from ..schema import ops
from .functional import _MultiLoRA
from .pages import ModulePages
from .plan import PageTable, Plan

_TILE_ROWS = 16


class StackPages(ModulePages):
    """The pages of one stack of experts: those of :class:`ModulePages`, one for every expert.

    ``A [pages E, page_rank, K]`` and ``B [pages E, page_rank, N]``; tables by adapter and expert.
    """

    def __init__(self, table: PageTable, experts: int, N: int, K: int) -> None:
        self.experts = experts
        super().__init__(table, N, K, parts=experts)

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

    Differentiable in x and bias. The adapters are the bank's own.
    """
    y = grouped_linear_4bit(x, w, offsets, bias, transposed)
    if plan.is_base_only or not pages.covers(plan):
        return y
    call = _OfCall(plan, plan_of_call(plan.args, pages, offsets, tokens))
    x = x.to(y.dtype)  # under autocast
    if wants_grad(x, w, y):
        return _MultiLoRA.apply(y, x, None, (call, pages, [], plan.version, ()))
    ops.multi_lora_(y, x, *call.args, *pages.op_args(), None)
    return y
