"""What an adapter adds to a tile of a product, and its own skinny products: S, dS, dA, dB and dbias.

All of them are as accurate as float32, whatever the dtypes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..arguments import ceil_div
from .launch import launch, precision_of
from .primitives import dot, kept, rounded
from .unpack import Dropout


class Lora(NamedTuple):
    """rows [M, R] times factor [R, columns], times ``scaling``, under dropout or not.

    Forward: S and Bᵀ. Backward: dS and A, with the dropout of x.
    """

    rows: torch.Tensor  # float32, contiguous
    factor: torch.Tensor
    stride_r: int  # of factor
    stride_j: int
    R: int
    scaling: float
    seed: torch.Tensor | None
    threshold: int
    keep_scale: float


def forward_lora(s: torch.Tensor, B: torch.Tensor, scaling: float) -> Lora:
    return Lora(s, B, 1, B.stride(0), s.shape[1], scaling, None, 0, 1.0)


def backward_lora(ds: torch.Tensor, A: torch.Tensor, dropout: Dropout | None) -> Lora:
    mask = (None, 0, 1.0) if dropout is None else dropout
    return Lora(ds, A, A.stride(0), 1, ds.shape[1], 1.0, *mask)


@triton.jit
def lora_tile(a, m, j0, M, J, PRECISION: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr):
    """What one adapter adds to rows m and columns j0 .. j0 + BJ: more steps of the sum, 16 ranks each."""
    j = j0 + tl.arange(0, BJ)
    acc = tl.zeros((BM, BJ), tl.float32)
    for r0 in range(0, a.R, 16):
        r = r0 + tl.arange(0, 16)
        at = m.to(tl.int64)[:, None] * a.R + r[None, :]
        left = tl.load(a.rows + at, (m < M)[:, None] & (r < a.R)[None, :], 0.0)
        at = r.to(tl.int64)[:, None] * a.stride_r + j.to(tl.int64)[None, :] * a.stride_j
        right = tl.load(a.factor + at, (r < a.R)[:, None] & (j < J)[None, :], 0.0)
        acc = dot(left, right, acc, PRECISION)
    acc *= a.scaling
    if a.seed is not None:
        acc = tl.where(kept(a.seed, a.threshold, m, j0, BJ), acc * a.keep_scale, 0.0)
    return acc


# -- skinny products -------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["I", "P", "span"])
def _skinny(
    act, factor, out, dropout, I, P, R, act_i, act_p, factor_p, factor_r, out_split, out_i, out_r,
    scale, span, X_ROWS: tl.constexpr, PRECISION: tl.constexpr, BI: tl.constexpr,
    BP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[split, i, r] = scale Σ_p act[i, p] factor[p, r] over one span of p.

    Under dropout act is x, whose row is i (``X_ROWS``) or p.
    """
    tiles_i = tl.cdiv(I, BI)
    pid = tl.program_id(0)
    i0, split, r0 = (
        pid % tiles_i * BI,
        pid // tiles_i // tl.cdiv(R, BR),
        pid // tiles_i % tl.cdiv(R, BR) * BR,
    )
    i, r = i0 + tl.arange(0, BI), r0 + tl.arange(0, BR)
    acc = tl.zeros((BI, BR), tl.float32)
    for p0 in range(split * span, tl.minimum(split * span + span, P), BP):
        p = p0 + tl.arange(0, BP)
        at = i.to(tl.int64)[:, None] * act_i + p.to(tl.int64)[None, :] * act_p
        left = tl.load(act + at, (i < I)[:, None] & (p < P)[None, :], 0.0)
        if dropout is not None:
            if X_ROWS:
                keep = kept(dropout.seed, dropout.threshold, i, p0, BP)
            else:
                keep = tl.trans(kept(dropout.seed, dropout.threshold, p, i0, BI))
            left = tl.where(keep, left, 0.0)
        at = p.to(tl.int64)[:, None] * factor_p + r.to(tl.int64)[None, :] * factor_r
        right = tl.load(factor + at, (p < P)[:, None] & (r < R)[None, :], 0.0)
        acc = dot(left, right, acc, PRECISION)
    if dropout is not None:
        acc *= dropout.scale
    at = (
        i.to(tl.int64)[:, None] * out_i
        + r.to(tl.int64)[None, :] * out_r
        + split.to(tl.int64) * out_split
    )
    inside = (i < I)[:, None] & (r < R)[None, :]
    tl.store(out + at, rounded(acc * scale, out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["I", "split_k"])
def _add_splits(splits, out, I, J, split_k, out_i, out_j, BLOCK: tl.constexpr):
    """out[i, j] = the sum of splits[:, i, j] in their order."""
    numel = I.to(tl.int64) * J
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for p in range(split_k):
        acc += tl.load(splits + p * numel + at, at < numel, 0.0)
    i, j = at // J, at % J
    tl.store(out + i * out_i + j * out_j, rounded(acc, out.dtype.element_ty), at < numel)


@triton.jit(do_not_specialize=["M", "span"])
def _column_sums(dy, out, M, N, stride, span, BN: tl.constexpr, BM: tl.constexpr):
    """out[split, n] = Σ_m dy[m, n] over one span of rows."""
    tiles = tl.cdiv(N, BN)
    split = tl.program_id(0) // tiles
    n = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for m0 in range(split * span, tl.minimum(split * span + span, M), BM):
        m = m0 + tl.arange(0, BM)
        at = m.to(tl.int64)[:, None] * stride + n[None, :]
        acc += tl.load(dy + at, (m < M)[:, None] & (n < N)[None, :], 0.0).to(tl.float32)
    sums = rounded(tl.sum(acc, 0), out.dtype.element_ty)
    tl.store(out + split.to(tl.int64) * N + n, sums, n < N)


def add_splits(splits: torch.Tensor, out: torch.Tensor) -> None:
    """out [I, J] = splits.sum(0), in order, rounded once; splits is float32 [split_k, I, J], contiguous."""
    split_k, I, J = splits.shape
    launch(
        _add_splits, ceil_div(I * J, 1024), splits, out, I, J, split_k, out.stride(0), out.stride(1),
        BLOCK=1024, num_warps=4,
    )  # fmt: skip


def _in_splits(out: torch.Tensor, depth: int, span: int, run) -> None:
    """``run(target, split_k, strides of target)`` for a sum of ``depth`` terms, of which a program adds ``span``."""
    split_k = ceil_div(depth, span)
    if split_k == 0:
        out.zero_()
    elif split_k == 1:
        run(out, 1, (0, *out.stride()))
    else:
        target = out.new_empty((split_k, *out.shape), dtype=torch.float32)
        run(target, split_k, target.stride())
        add_splits(target, out)


def skinny(
    out: torch.Tensor,
    act: torch.Tensor,
    factor: torch.Tensor,
    scale: float = 1.0,
    dropout: Dropout | None = None,
    span: int = 1024,
    x_rows: bool = True,
) -> None:
    """out [I, R] = scale dropout(act) factor, with act [I, P], factor [P, R]: any strides."""
    (I, P), R = act.shape, factor.shape[1]
    br = min(64, max(16, triton.next_power_of_2(R)))

    def run(target, split_k, strides):
        launch(
            _skinny, ceil_div(I, 64) * ceil_div(R, br) * split_k, act, factor, target, dropout,
            I, P, R, *act.stride(), *factor.stride(), *strides, scale, span,
            X_ROWS=x_rows, PRECISION=precision_of(act.dtype), BI=64, BP=32, BR=br, num_warps=4, num_stages=2,
        )  # fmt: skip

    _in_splits(out, P, span, run)


def lora_rows(
    act: torch.Tensor, factor: torch.Tensor, scale: float, dropout: Dropout | None
) -> torch.Tensor:
    """S = dropout(x) Aᵀ or dS = scaling dy B: float32 [M, R].

    Few rows are cut along their length more often, to keep a GPU busy: the bits of a row depend on whether it is
    among more than 64.
    """
    out = act.new_empty((act.shape[0], factor.shape[1]), dtype=torch.float32)
    skinny(out, act, factor, scale, dropout, 256 if act.shape[0] <= 64 else 1024)
    return out


def column_sums(out: torch.Tensor, dy: torch.Tensor) -> None:
    """out [N] = Σ_m dy[m, n]."""
    M, N = dy.shape

    def run(target, split_k, _strides):
        launch(
            _column_sums, ceil_div(N, 64) * split_k, dy, target, M, N, dy.stride(0), 1024,
            BN=64, BM=32, num_warps=4,
        )  # fmt: skip

    _in_splits(out[None], M, 1024, run)
