"""The scheme of vLLM's two Triton kernels for adapters, written after its source (vllm/lora/ops/triton_ops).

Rows are sorted by adapter. *Shrink* cuts K into SPLIT_K parts, whose sums meet in a float32 buffer by
atomic additions; *expand* reads that buffer and adds to y. Grids have tiles for as many rows as the whole
batch for every adapter in it; those without rows return at once. Adapters are padded to one rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# vLLM's sizes where it has no tuned ones for a device: batches under FEW_ROWS rows and larger ones.
FEW_ROWS = 128
SHRINK = {
    True: {"BLOCK_M": 32, "BLOCK_R": 16, "BLOCK_K": 256, "SPLIT_K": 64},
    False: {"BLOCK_M": 32, "BLOCK_R": 16, "BLOCK_K": 32, "SPLIT_K": 8},
}
EXPAND = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_R": 16}


class Batch(NamedTuple):
    """int32 tensors: row numbers by adapter; per adapter of the batch: which, its first of them, how many."""

    rows: torch.Tensor
    adapters: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor


def sorted_batch(index: torch.Tensor) -> Batch:
    """``index [M]``: the adapter of each row."""
    adapters, counts = torch.unique(index, return_counts=True)
    rows = torch.argsort(index, stable=True)
    return Batch(*(t.int() for t in (rows, adapters, counts.cumsum(0) - counts, counts)))


@triton.jit
def _rows_of_tile(rows, adapters, starts, count, tile, BLOCK_M: tl.constexpr):
    """The adapter of a tile, the row numbers, and which of them there are."""
    start = tl.load(starts + tl.program_id(1))
    adapter = tl.load(adapters + tl.program_id(1)).to(tl.int64)
    offsets = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    there = offsets < count
    return adapter, tl.load(rows + start + offsets, mask=there, other=0), there


@triton.jit
def _shrink(
    x, A, s, rows, adapters, starts, counts, K, R, scaling,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    part, tile = tl.program_id(0) % SPLIT_K, tl.program_id(0) // SPLIT_K
    rank_tiles = tl.cdiv(R, BLOCK_R)
    tile_m, tile_r = tile // rank_tiles, tile % rank_tiles
    count = tl.load(counts + tl.program_id(1))
    if tile_m * BLOCK_M >= count:
        return
    adapter, m, there = _rows_of_tile(rows, adapters, starts, count, tile_m, BLOCK_M)
    r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for first in range(part * BLOCK_K, K, BLOCK_K * SPLIT_K):
        k = first + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x + m[:, None] * K + k[None, :], mask=k[None, :] < K, other=0.0)
        inside = (r[None, :] < R) & (k[:, None] < K)
        A_tile = tl.load(A + (adapter * R + r[None, :]) * K + k[:, None], mask=inside, other=0.0)
        total += tl.dot(x_tile, A_tile)
    inside = there[:, None] & (r[None, :] < R)
    tl.atomic_add(s + m[:, None] * R + r[None, :], scaling * total, mask=inside, sem="relaxed")


@triton.jit
def _expand(
    y, s, B, rows, adapters, starts, counts, N, R,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // columns, tl.program_id(0) % columns
    count = tl.load(counts + tl.program_id(1))
    if tile_m * BLOCK_M >= count:
        return
    adapter, m, there = _rows_of_tile(rows, adapters, starts, count, tile_m, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, R, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        s_tile = tl.load(s + m[:, None] * R + r[None, :], mask=r[None, :] < R, other=0.0)
        inside = (n[None, :] < N) & (r[:, None] < R)
        B_tile = tl.load(B + (adapter * N + n[None, :]) * R + r[:, None], mask=inside, other=0.0)
        total += tl.dot(s_tile.to(B.dtype.element_ty), B_tile)
    inside = there[:, None] & (n[None, :] < N)
    place = y + m[:, None] * N + n[None, :]
    y_tile = tl.load(place, mask=inside, other=0.0)
    tl.store(place, total.to(y_tile.dtype) + y_tile, mask=inside)


def add(
    y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, batch: Batch, scaling: float
) -> torch.Tensor:
    """``y [M, N]`` += scaling · x Aᵀ Bᵀ of each row's adapter; A ``[adapters, R, K]``, B ``[adapters, N, R]``."""
    (M, K), N, R, adapters = x.shape, y.shape[1], A.shape[1], len(batch.adapters)
    s = torch.zeros(M, R, dtype=torch.float32, device=x.device)
    sizes = SHRINK[M < FEW_ROWS]
    tiles = triton.cdiv(M, sizes["BLOCK_M"]) * triton.cdiv(R, sizes["BLOCK_R"])
    grid = (sizes["SPLIT_K"] * tiles, adapters)
    _shrink[grid](x, A, s, *batch, K, R, scaling, **sizes)
    grid = (triton.cdiv(M, EXPAND["BLOCK_M"]) * triton.cdiv(N, EXPAND["BLOCK_N"]), adapters)
    _expand[grid](y, s, B, *batch, N, R, **EXPAND)
    return y
