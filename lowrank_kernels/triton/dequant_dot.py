"""Products with the frozen base, a tile of the result each: x Wᵀ (forward) and dy W (backward).

A base is read in one of three ways.

``runs``      4 bits, blocks that do not cross rows: rows are whole bytes, and a tile is not wider than a block, so
              that each of its rows has one scale. The even and the odd elements of a row are two products, because
              that is how bytes come apart: no lane ever has to hand an element to another one
``elements``  any other weight in 4 bits: element by element, in float32
``dense``     a matrix
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    block_scale,
    code_pairs,
    code_words,
    dot,
    rounded,
    split_pairs,
    weight_elements,
)


@triton.jit
def forward(
    x, w, x_stride, w_stride, m, n, M, N, K, begin, end,
    dtype: tl.constexpr, BASE: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
    PRMT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x[m] W[n]ᵀ over the steps [begin, end) of BK inputs each; of ``runs``, x comes in pairs."""
    acc = tl.zeros((BM, BN), tl.float32)
    x_row, rows, cols = m.to(tl.int64) * x_stride, (m < M)[:, None], (n < N)[None, :]
    if BASE == "runs":
        words = code_words(w.code, dtype) if PRMT else ()
        half = tl.arange(0, BK // 2)
        x_at = x + x_row[:, None] + half[None, :]
        w_at = w.packed + (n.to(tl.int64) * (K // 2))[None, :] + half[:, None]
        block = n.to(tl.int64) * (K >> SHIFT)
        for step in range(begin, end):
            pair = tl.load(x_at + step * (BK // 2), rows, 0)
            packed = tl.load(w_at + step * (BK // 2), cols, 0)
            x_even, x_odd = split_pairs(pair, dtype)
            w_even, w_odd = code_pairs(packed, w.code, words, dtype, PRMT)
            product = dot(x_even, w_even, tl.zeros((BM, BN), tl.float32), PRECISION)
            product = dot(x_odd, w_odd, product, PRECISION)
            scale = block_scale(w, block + (step * BK >> SHIFT), n < N)
            acc = tl.fma(product, tl.broadcast_to(scale[None, :], (BM, BN)), acc)
    else:
        for step in range(begin, end):
            k = step * BK + tl.arange(0, BK)
            left = tl.load(x + x_row[:, None] + k[None, :], rows & (k < K)[None, :], 0.0)
            inside = (k < K)[:, None] & cols
            if BASE == "dense":
                at = n.to(tl.int64)[None, :] * w_stride + k[:, None]
                acc = dot(left, tl.load(w + at, inside, 0.0), acc, PRECISION)
            else:
                at = n.to(tl.int64)[None, :] * K + k[:, None]
                acc = dot(left, weight_elements(w, at, inside, SHIFT), acc, PRECISION)
    return acc


@triton.jit
def backward(
    dy, w, dy_stride, w_stride, m, k0, M, N, K, begin, end, first,
    dtype: tl.constexpr, BASE: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dy[m] W[:, k0 : k0 + BK] over the steps [begin, end) of BN outputs each; W's first row is row ``first`` of w."""
    dy_row, rows = m.to(tl.int64) * dy_stride, (m < M)[:, None]
    if BASE == "runs":
        even, odd = tl.zeros((BM, BK // 2), tl.float32), tl.zeros((BM, BK // 2), tl.float32)
        byte = k0 // 2 + tl.arange(0, BK // 2)
        for step in range(begin, end):
            n = step * BN + tl.arange(0, BN)
            left = tl.load(dy + dy_row[:, None] + n[None, :], rows & (n < N)[None, :], 0.0)
            row = first + n.to(tl.int64)
            inside = (n < N)[:, None] & (byte < K // 2)[None, :]
            packed = tl.load(w.packed + (row * (K // 2))[:, None] + byte[None, :], inside, 0)
            scale = block_scale(w, row * (K >> SHIFT) + (k0 >> SHIFT), n < N)[:, None]
            w_even = rounded(tl.load(w.code + (packed >> 4)) * scale, dtype)
            w_odd = rounded(tl.load(w.code + (packed & 15)) * scale, dtype)
            even = dot(left, w_even, even, PRECISION)
            odd = dot(left, w_odd, odd, PRECISION)
        acc = tl.interleave(even, odd)
    else:
        acc = tl.zeros((BM, BK), tl.float32)
        k = k0 + tl.arange(0, BK)
        for step in range(begin, end):
            n = step * BN + tl.arange(0, BN)
            left = tl.load(dy + dy_row[:, None] + n[None, :], rows & (n < N)[None, :], 0.0)
            inside = (n < N)[:, None] & (k < K)[None, :]
            if BASE == "dense":
                at = n.to(tl.int64)[:, None] * w_stride + k[None, :]
                acc = dot(left, tl.load(w + at, inside, 0.0), acc, PRECISION)
            else:
                at = (first + n.to(tl.int64))[:, None] * K + k[None, :]
                acc = dot(left, weight_elements(w, at, inside, SHIFT), acc, PRECISION)
    return acc
