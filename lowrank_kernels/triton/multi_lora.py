"""Many adapters in one batch without a base: y += scaling S Bᵀ, row by row, and the gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..arguments import PagesArgs, PlanArgs, ceil_div, flat
from .launch import launch, precision_of
from .lora import add_splits
from .paged_lora import (
    Batch,
    FactorPages,
    PagedLora,
    keep_scale_of,
    page_rows,
    paged_lora_tile,
    threshold_of,
    unpack_batch,
)  # fmt: skip
from .primitives import dot, kept, rounded
from .unpack import Unpack, require


@triton.jit(do_not_specialize=["split_k", "span"])
def _rows_of_adapters(
    act, plan, pages, out, P, act_stride, out_split, out_stride, max_rank, split_k, span,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[split, m, r] = scaling Σ_p dropout(act)[m, p] factor[r, p] over one span of p, for the rows of one tile."""
    pid = tl.program_id(0)
    split, tiles_r = pid % split_k, tl.cdiv(max_rank, BR)
    r0, at_tile = pid // split_k % tiles_r * BR, plan.tiles + 4 * (pid // split_k // tiles_r)
    slot, row0 = tl.load(at_tile), tl.load(at_tile + 1)
    count, page0 = tl.load(at_tile + 2), tl.load(at_tile + 3)
    rank = tl.load(pages.ranks + slot, count > 0, 0)
    if r0 < rank:
        i, r = tl.arange(0, ROWS), r0 + tl.arange(0, BR)
        m = tl.load(plan.rows + row0 + i, i < count, 0)
        act_row, row = m.to(tl.int64) * act_stride, page_rows(pages, plan.page_ids, page0, r, rank)
        acc = tl.zeros((ROWS, BR), tl.float32)
        if pages.seed is not None:
            p_drop = tl.load(pages.dropout_p + slot)
        for p0 in range(split * span, tl.minimum(split * span + span, P), BP):
            p = p0 + tl.arange(0, BP)
            inside = (i < count)[:, None] & (p < P)[None, :]
            left = tl.load(act + act_row[:, None] + p[None, :], inside, 0.0)
            if pages.seed is not None:
                left = tl.where(kept(pages.seed, threshold_of(p_drop), m, p0, BP), left, 0.0)
            inside = (p < P)[:, None] & (r < rank)[None, :]
            right = tl.load(pages.factor + row[None, :] * P + p[:, None], inside, 0.0)
            acc = dot(left, right, acc, PRECISION)
        if pages.seed is not None:
            acc *= keep_scale_of(p_drop)
        if pages.scalings is not None:
            acc *= tl.load(pages.scalings + slot)
        at = split.to(tl.int64) * out_split + m.to(tl.int64)[:, None] * out_stride + r[None, :]
        tl.store(out + at, acc, (i < count)[:, None] & (r < rank)[None, :])


@triton.jit
def _gradients(
    act, rows, plan, pages, grad_rows, out, C, tile_count, act_stride, rows_stride, max_rank,
    PRECISION: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[grad_rows[u] + r, c] = scaling Σ_m rows[m, r] dropout(act)[m, c] over the rows of slot u, in their order."""
    pid = tl.program_id(0)
    tiles_c, tiles_r = tl.cdiv(C, BC), tl.cdiv(max_rank, BR)
    c0, r0, slot = pid % tiles_c * BC, pid // tiles_c % tiles_r * BR, pid // tiles_c // tiles_r
    first, rank = tl.load(grad_rows + slot), tl.load(pages.ranks + slot)
    if (first >= 0) & (r0 < rank):
        begin, count = 2147483647, 0
        for t0 in range(0, tile_count, 128):
            t = t0 + tl.arange(0, 128)
            mine = tl.load(plan.tiles + 4 * t, t < tile_count, -1) == slot
            size = tl.load(plan.tiles + 4 * t + 2, mine, 0)
            row0 = tl.load(plan.tiles + 4 * t + 1, mine & (size > 0), 2147483647)
            begin, count = tl.minimum(begin, tl.min(row0, 0)), count + tl.sum(size, 0)
        c, r = c0 + tl.arange(0, BC), r0 + tl.arange(0, BR)
        acc = tl.zeros((BR, BC), tl.float32)
        if pages.seed is not None:
            p_drop = tl.load(pages.dropout_p + slot)
        for i0 in range(0, count, BM):
            i = i0 + tl.arange(0, BM)
            m = tl.load(plan.rows + begin + i, i < count, 0)
            at = m.to(tl.int64)[None, :] * rows_stride + r[:, None]
            left = tl.load(rows + at, (i < count)[None, :] & (r < rank)[:, None], 0.0)
            at = m.to(tl.int64)[:, None] * act_stride + c[None, :]
            right = tl.load(act + at, (i < count)[:, None] & (c < C)[None, :], 0.0)
            if pages.seed is not None:
                right = tl.where(kept(pages.seed, threshold_of(p_drop), m, c0, BC), right, 0.0)
            acc = dot(left, right, acc, PRECISION)
        if pages.seed is not None:
            acc *= keep_scale_of(p_drop)
        if pages.scalings is not None:
            acc *= tl.load(pages.scalings + slot)
        at = (first.to(tl.int64) + r)[:, None] * C + c[None, :]
        tl.store(out + at, acc, (r < rank)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["M"])
def _add_adapters(
    adapters, out, M, J, out_stride,
    ADD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """out[m] (+)= what the adapter of row m gives; with ``ADD`` rows without one are not touched."""
    tiles_m = tl.cdiv(M, BM)
    m = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)
    j0 = tl.program_id(0) // tiles_m * BJ
    j = j0 + tl.arange(0, BJ)
    acc = paged_lora_tile(adapters, m, j0, M, J, PRECISION, BM, BJ)
    at = m.to(tl.int64)[:, None] * out_stride + j[None, :]
    inside = (m < M)[:, None] & (j < J)[None, :]
    if ADD:
        inside &= (tl.load(adapters.plan.tile_of_row + m, m < M, -1) >= 0)[:, None]
        acc += tl.load(out + at, inside, 0.0).to(tl.float32)
    tl.store(out + at, rounded(acc, out.dtype.element_ty), inside)


def rows_of_adapters(act: torch.Tensor, batch: Batch, pages: FactorPages) -> torch.Tensor:
    """S = dropout(x) Aᵀ or dS = scaling dy B of each row: float32 [M, s_stride], zero where there is nothing."""
    (M, P), stride = act.shape, batch.s_stride
    tile_count = batch.plan.tiles.numel() // 4
    span = 256 if M <= 64 else 1024
    split_k = max(1, ceil_div(P, span))
    out = act.new_zeros((split_k, M, stride), dtype=torch.float32)
    br = min(64, max(16, triton.next_power_of_2(stride)))
    launch(
        _rows_of_adapters, tile_count * ceil_div(batch.max_rank, br) * split_k,
        act, batch.plan, pages, out, P, act.stride(0), M * stride, stride, batch.max_rank, split_k, span,
        PRECISION=precision_of(act.dtype), ROWS=batch.tile_rows, BP=32, BR=br,
        num_warps=4 if batch.tile_rows < 64 else 8,
    )  # fmt: skip
    if split_k == 1:
        return out[0]
    result = act.new_empty((M, stride), dtype=torch.float32)
    add_splits(out, result)
    return result


def gradients(
    act: torch.Tensor,
    rows: torch.Tensor,
    batch: Batch,
    pages: FactorPages,
    grad_rows,
    grad_rank: int,
) -> torch.Tensor:
    """dA from x and dS, dB (transposed) from dy and S: float32 [grad_rank, width]."""
    C, slots = act.shape[1], pages.ranks.numel()
    out = act.new_zeros((grad_rank, C), dtype=torch.float32)
    launch(
        _gradients, slots * ceil_div(batch.max_rank, 16) * ceil_div(C, 64) if grad_rank else 0,
        act, rows, batch.plan, pages, grad_rows, out, C, batch.plan.tiles.numel() // 4,
        act.stride(0), batch.s_stride, batch.max_rank,
        PRECISION=precision_of(act.dtype), BM=32, BC=64, BR=16, num_warps=8,
    )  # fmt: skip
    return out


def _add(adapters: PagedLora, out: torch.Tensor, add: bool) -> None:
    M, J = out.shape
    launch(
        _add_adapters, ceil_div(M, 16) * ceil_div(J, 64), adapters, out, M, J, out.stride(0),
        ADD=add, PRECISION=precision_of(out.dtype), BM=16, BJ=64, num_warps=4,
    )  # fmt: skip


@flat
def multi_lora_(y, x, plan: PlanArgs, pages: PagesArgs) -> torch.Tensor:
    unpack = Unpack(x)
    require(x.dim() == 2 and y.dim() == 2, "x, y: expected matrices")
    require(y.dtype == x.dtype, f"y: expected the dtype of x, {x.dtype}, got {y.dtype}")
    (M, K), N = x.shape, y.shape[1]
    batch = unpack_batch(unpack, plan, pages, M, N, K)
    x, target = unpack.matrix("x", x, M, K), unpack.matrix("y", y, M, N)
    s = rows_of_adapters(x, batch, batch.A)
    _add(PagedLora(s, batch.s_stride, batch.plan, batch.B), target, add=True)
    if target is not y:
        y.copy_(target)
    return s


class Gradients(NamedTuple):
    """What both backwards have in common: dy as the kernels take it, dS, dA and dB."""

    dy: torch.Tensor
    batch: Batch
    ds: torch.Tensor
    dA: torch.Tensor
    dB: torch.Tensor

    def through_adapters(self) -> PagedLora:
        """What the adapters add to dx."""
        return PagedLora(self.ds, self.batch.s_stride, self.batch.plan, self.batch.A)


def _check_grad_rows(grad_rows: torch.Tensor, ranks: torch.Tensor, grad_rank: int) -> None:
    """As csrc/ops/arguments.h: on a GPU the numbers cannot be read without waiting for it."""
    if grad_rows.device.type != "cpu":
        return
    for slot, (first, rank) in enumerate(zip(grad_rows.tolist(), ranks.tolist(), strict=True)):
        require(
            first < 0 or (rank >= 0 and first + rank <= grad_rank),
            f"grad_rows: expected rows below grad_rank = {grad_rank}, got rows from {first} for the {rank} "
            f"ranks of slot {slot}",
        )


def adapter_gradients(
    unpack: Unpack, dy, x, s, plan: PlanArgs, pages: PagesArgs, N: int, K: int, grad_rows, grad_rank
) -> Gradients:
    M = dy.shape[0]
    batch = unpack_batch(unpack, plan, pages, M, N, K)
    require(0 <= grad_rank < 2**31, f"grad_rank: expected 0..2^31-1, got {grad_rank}")
    s = unpack.data("s", s.contiguous(), torch.float32, M * batch.s_stride)
    grad_rows = unpack.data("grad_rows", grad_rows, torch.int32, batch.A.ranks.numel())
    _check_grad_rows(grad_rows, batch.A.ranks, grad_rank)
    dy, x = unpack.matrix("dy", dy, M, N), unpack.matrix("x", x, M, K)
    ds = rows_of_adapters(dy, batch, batch.B)
    # dS has the scaling already, and dropout is of x alone.
    dA = gradients(x, ds, batch, batch.A, grad_rows, grad_rank)
    dB = gradients(dy, s, batch, batch.B, grad_rows, grad_rank)
    return Gradients(dy, batch, ds, dA, dB)


@flat
def multi_lora_backward(dy, x, s, plan: PlanArgs, pages: PagesArgs, grad_rows, grad_rank, need_dx):
    require(dy.dim() == 2 and x.dim() == 2, "dy, x: expected matrices")
    N, K = dy.shape[1], x.shape[1]
    g = adapter_gradients(Unpack(dy), dy, x, s, plan, pages, N, K, grad_rows, grad_rank)
    dx = dy.new_empty(x.shape if need_dx else 0)
    if need_dx:
        _add(g.through_adapters(), dx, add=False)
    return dx, g.dA, g.dB
