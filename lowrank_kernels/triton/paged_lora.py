"""Many adapters in one batch: which row has which (a plan), where they are (pages), and what they add to a tile.

Ranks of an adapter lie in pages, rank-major for A and for B (transposed), so that both directions read them alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..arguments import RANK_STEP, TILE_ROWS, PagesArgs, PlanArgs, ceil_div
from .primitives import dot, kept
from .unpack import Unpack, require, sizes

_NO_TILE = tl.constexpr(2**31 - 1)


class DevicePlan(NamedTuple):
    """The tensors of PlanArgs."""

    tiles: torch.Tensor
    page_ids: torch.Tensor
    tile_of_row: torch.Tensor
    rows: torch.Tensor


class FactorPages(NamedTuple):
    """One side of all adapters, A or B: [pages * page_rank, width] without gaps, and what each slot has."""

    factor: torch.Tensor
    page_rank: int
    ranks: torch.Tensor
    scalings: torch.Tensor | None  # None: 1
    dropout_p: torch.Tensor
    seed: torch.Tensor | None  # None: no dropout


class PagedLora(NamedTuple):
    """rows [M, stride] times the factor of each row's adapter; zero where a row has none.

    Forward: S, B and scaling. Backward: dS, A and the dropout of x.
    """

    rows: torch.Tensor
    stride: int
    plan: DevicePlan
    pages: FactorPages


class Batch(NamedTuple):
    """A plan and the pages of one module, checked."""

    plan: DevicePlan
    A: FactorPages  # with dropout
    B: FactorPages  # with scaling
    tile_rows: int
    max_rank: int
    s_stride: int


def unpack_batch(unpack: Unpack, plan: PlanArgs, pages: PagesArgs, M: int, N: int, K: int) -> Batch:
    """The integers of a plan are not read here: that would wait for the device."""
    require(
        plan.tile_rows in TILE_ROWS,
        f"tile_rows: expected one of {TILE_ROWS}, got {plan.tile_rows}",
    )
    require(0 <= plan.max_rank < 2**24, f"max_rank: expected a rank, got {plan.max_rank}")
    sizes(M=M, N=N, K=K)
    i32 = torch.int32
    device_plan = DevicePlan(
        unpack.data("tiles", plan.tiles, i32, plan.tiles.numel() // 4 * 4),
        unpack.data("page_ids", plan.page_ids, i32, plan.page_ids.numel()),
        unpack.data("tile_of_row", plan.tile_of_row, i32, M),
        unpack.data("rows", plan.rows, i32, plan.rows.numel()),
    )
    s_stride = ceil_div(plan.max_rank, RANK_STEP) * RANK_STEP
    A, B = _sides(unpack, pages, N, K)
    return Batch(device_plan, A, B, plan.tile_rows, plan.max_rank, s_stride)


def _sides(unpack: Unpack, pages: PagesArgs, N: int, K: int) -> tuple[FactorPages, FactorPages]:
    """The pages of A with dropout, and those of B with scaling."""
    A, B = pages.A_pages, pages.B_pages
    require(
        A.dim() == 3 and B.dim() == 3,
        "A_pages, B_pages: expected [pages, page_rank, K] and [pages, page_rank, N]",
    )
    count, page_rank = A.shape[:2]
    require(
        page_rank > 0 and page_rank % RANK_STEP == 0,
        f"page_rank: expected a multiple of {RANK_STEP}, got {page_rank}",
    )
    require(A.dtype == B.dtype, "B_pages: expected the dtype of A_pages")
    factors = []
    for name, t, width in (("A_pages", A, K), ("B_pages", B, N)):
        require(
            tuple(t.shape) == (count, page_rank, width) and t.is_contiguous(),
            f"{name}: expected contiguous [{count}, {page_rank}, {width}], got {tuple(t.shape)}",
        )
        factors.append(unpack.matrix(name, t.view(-1, width), count * page_rank, width))
    slots = pages.ranks.numel()
    ranks = unpack.data("ranks", pages.ranks, torch.int32, slots)
    scalings = unpack.data("scalings", pages.scalings, torch.float32, slots)
    dropout_p = unpack.data("dropout_p", pages.dropout_p, torch.float64, slots)
    seed = pages.seed if pages.seed is None else unpack.data("seed", pages.seed, torch.int64, 1)
    return (
        FactorPages(factors[0], page_rank, ranks, None, dropout_p, seed),
        FactorPages(factors[1], page_rank, ranks, scalings, dropout_p, None),
    )


@triton.jit
def threshold_of(p):
    """What a word of Philox must reach for an element to be kept, p float64."""
    return (p * 4294967296.0).to(tl.int64).to(tl.uint32)


@triton.jit
def keep_scale_of(p):
    return (1.0 / (1.0 - p)).to(tl.float32)


@triton.jit
def page_rows(pages, page_ids, page0, r, rank):
    """The rows of the factor that hold ranks r of the adapter whose pages begin at page0; 64 bits."""
    ids = tl.load(page_ids + page0 + r // pages.page_rank, r < rank, 0)
    return ids.to(tl.int64) * pages.page_rank + r % pages.page_rank


@triton.jit
def paged_lora_tile(a, m, j0, M, J, PRECISION: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr):
    """What the adapters of rows m add to columns j0 .. j0 + BJ: one adapter after the other, in the order of the plan.

    A row takes the sum of its own adapter alone: its bits do not depend on the others.
    """
    tile = tl.load(a.plan.tile_of_row + m, m < M, -1)
    j = j0 + tl.arange(0, BJ)
    acc = tl.zeros((BM, BJ), tl.float32)
    last = tl.max(tile, 0)
    current = tl.min(tl.where(tile >= 0, tile, _NO_TILE), 0)
    while current <= last:
        slot, page0 = tl.load(a.plan.tiles + 4 * current), tl.load(a.plan.tiles + 4 * current + 3)
        rank = tl.load(a.pages.ranks + slot)
        here = tile == current
        term = tl.zeros((BM, BJ), tl.float32)
        for r0 in range(0, rank, 16):
            r = r0 + tl.arange(0, 16)
            at = m.to(tl.int64)[:, None] * a.stride + r[None, :]
            left = tl.load(a.rows + at, here[:, None] & (r < rank)[None, :], 0.0)
            row = page_rows(a.pages, a.plan.page_ids, page0, r, rank)
            at = row[:, None] * J + j[None, :]
            right = tl.load(a.pages.factor + at, (r < rank)[:, None] & (j < J)[None, :], 0.0)
            term = dot(left, right, term, PRECISION)
        if a.pages.scalings is not None:
            term *= tl.load(a.pages.scalings + slot)
        acc = tl.where(here[:, None], term, acc)
        current = tl.min(tl.where(tile > current, tile, _NO_TILE), 0)
    if a.pages.seed is not None:
        slots = tl.load(a.plan.tiles + 4 * tile, tile >= 0, 0)
        p = tl.load(a.pages.dropout_p + slots, tile >= 0, 0.0)
        keep = kept(a.pages.seed, threshold_of(p)[:, None], m, j0, BJ)
        acc = tl.where(keep, acc * keep_scale_of(p)[:, None], 0.0)
    return acc
