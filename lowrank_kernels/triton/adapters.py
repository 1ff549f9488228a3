"""Many adapters in one batch: which row has which (a plan), where they are (pages), and what they add to a tile.

Ranks of an adapter lie in pages, rank-major for A and for B (transposed), so that both directions read them alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..schema import RANK_STEP, ceil_div
from .arguments import Unpack, require, sizes
from .elements import dot, kept

_NO_TILE = tl.constexpr(2**31 - 1)


class Plan(NamedTuple):
    """Which rows share an adapter, see schema.py."""

    tiles: torch.Tensor
    page_ids: torch.Tensor
    tile_of_row: torch.Tensor
    rows: torch.Tensor


class Pages(NamedTuple):
    """One side of all adapters, A or B: [pages * page_rank, width] without gaps, and what each slot has."""

    factor: torch.Tensor
    page_rank: int
    ranks: torch.Tensor
    scalings: torch.Tensor | None  # None: 1
    dropout_p: torch.Tensor
    seed: torch.Tensor | None  # None: no dropout


class Adapters(NamedTuple):
    """rows [M, stride] times the factor of each row's adapter; zero where a row has none.

    Forward: S, B and scaling. Backward: dS, A and the dropout of x.
    """

    rows: torch.Tensor
    stride: int
    plan: Plan
    pages: Pages


class Batch(NamedTuple):
    """The arguments of schema.PLAN and schema.PAGES, checked."""

    plan: Plan
    A: Pages  # with dropout
    B: Pages  # with scaling
    tile_rows: int
    max_rank: int
    s_stride: int


def unpack_batch(unpack: Unpack, args: tuple, M: int, N: int, K: int) -> Batch:
    """The integers of a plan are not read here: that would wait for the device."""
    (tiles, page_ids, tile_of_row, rows, tile_rows, max_rank), pages = args[:6], args[6:12]
    A, B, ranks, scalings, dropout_p, seed = pages
    require(
        tile_rows in (16, 32, 64, 128), f"tile_rows: expected 16, 32, 64 or 128, got {tile_rows}"
    )
    require(0 <= max_rank < 2**24, f"max_rank: expected a rank, got {max_rank}")
    sizes(M=M, N=N, K=K)
    i32 = torch.int32
    plan = Plan(
        unpack.data("tiles", tiles, i32, tiles.numel() // 4 * 4),
        unpack.data("page_ids", page_ids, i32, page_ids.numel()),
        unpack.data("tile_of_row", tile_of_row, i32, M),
        unpack.data("rows", rows, i32, rows.numel()),
    )
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
    for name, t, width in (("A_pages", A, K), ("B_pages", B, N)):
        require(
            tuple(t.shape) == (count, page_rank, width) and t.is_contiguous(),
            f"{name}: expected contiguous [{count}, {page_rank}, {width}], got {tuple(t.shape)}",
        )
    slots = ranks.numel()
    ranks = unpack.data("ranks", ranks, i32, slots)
    scalings = unpack.data("scalings", scalings, torch.float32, slots)
    dropout_p = unpack.data("dropout_p", dropout_p, torch.float64, slots)
    if seed is not None:
        seed = unpack.data("seed", seed, torch.int64, 1)
    sides = []
    for name, t, width, *rest in (("A_pages", A, K, None, seed), ("B_pages", B, N, scalings, None)):
        factor = unpack.matrix(name, t.view(-1, width), count * page_rank, width)
        sides.append(Pages(factor, page_rank, ranks, rest[0], dropout_p, rest[1]))
    return Batch(plan, *sides, tile_rows, max_rank, ceil_div(max_rank, RANK_STEP) * RANK_STEP)


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
def adapters_tile(a, m, j0, M, J, PRECISION: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr):
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
        part = tl.zeros((BM, BJ), tl.float32)
        for r0 in range(0, rank, 16):
            r = r0 + tl.arange(0, 16)
            at = m.to(tl.int64)[:, None] * a.stride + r[None, :]
            left = tl.load(a.rows + at, here[:, None] & (r < rank)[None, :], 0.0)
            row = page_rows(a.pages, a.plan.page_ids, page0, r, rank)
            at = row[:, None] * J + j[None, :]
            right = tl.load(a.pages.factor + at, (r < rank)[:, None] & (j < J)[None, :], 0.0)
            part = dot(left, right, part, PRECISION)
        if a.pages.scalings is not None:
            part *= tl.load(a.pages.scalings + slot)
        acc = tl.where(here[:, None], part, acc)
        current = tl.min(tl.where(tile > current, tile, _NO_TILE), 0)
    if a.pages.seed is not None:
        slots = tl.load(a.plan.tiles + 4 * tile, tile >= 0, 0)
        p = tl.load(a.pages.dropout_p + slots, tile >= 0, 0.0)
        keep = kept(a.pages.seed, threshold_of(p)[:, None], m, j0, BJ)
        acc = tl.where(keep, acc * keep_scale_of(p)[:, None], 0.0)
    return acc
