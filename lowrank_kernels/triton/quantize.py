"""Quantization: absmax of each block and the nearest code of each element, then 8 bits for the absmax themselves.

The bytes are those of the reference: a value on a midpoint takes the lower code.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..arguments import FLOAT_DTYPES, NESTED_BLOCKSIZE, ceil_div
from .launch import launch
from .unpack import Unpack, require

SPAN = 4096  # absmax per partial sum of the mean


@triton.jit
def _magnitude(value):
    """The bits of |value|, which order as the values do, and a NaN above all."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _inverse(absmax):
    return tl.div_rn(
        tl.full(absmax.shape, 1.0, tl.float32), tl.where(absmax > 1e-38, absmax, 1e-38)
    )


@triton.jit
def _nearest(value, sorted_code, nibbles):
    """The nibble of the code nearest to each value, from 16 sorted codes."""
    at = tl.arange(0, 16)
    nibble = tl.zeros(value.shape, tl.int32) + tl.sum(tl.where(at == 0, nibbles, 0))
    low = tl.sum(tl.where(at == 0, sorted_code, 0.0))
    for rank in tl.static_range(1, 16):
        high = tl.sum(tl.where(at == rank, sorted_code, 0.0))
        here = tl.sum(tl.where(at == rank, nibbles, 0))
        nibble = tl.where(value > (low + high) * 0.5, here, nibble)
        low = high
    return nibble


@triton.jit
def _quantize(weight, code, packed, absmax, numel, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr):
    """Each program quantizes ``BLOCKS`` blocks, even and odd elements apart."""
    here = tl.arange(0, 16)
    codes = tl.load(code + here)
    # [i, j]: code j stands before code i; equal ones stay in their order.
    other, index = codes[None, :], here[None, :]
    before = (other < codes[:, None]) | ((other == codes[:, None]) & (index < here[:, None]))
    rank = tl.sum(before.to(tl.int32), 1)
    at_rank = rank[None, :] == here[:, None]
    sorted_code = tl.sum(tl.where(at_rank, codes[None, :], 0.0), 1)
    nibbles = tl.sum(tl.where(at_rank, here[None, :], 0), 1)

    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    byte = (block * (BLOCKSIZE // 2))[:, None] + tl.arange(0, BLOCKSIZE // 2)[None, :]
    even = tl.load(weight + 2 * byte, 2 * byte < numel, 0.0).to(tl.float32)
    odd = tl.load(weight + 2 * byte + 1, 2 * byte + 1 < numel, 0.0).to(tl.float32)
    largest = tl.max(tl.maximum(_magnitude(even), _magnitude(odd)), 1).to(tl.float32, bitcast=True)
    tl.store(absmax + block, largest, block * BLOCKSIZE < numel)
    inverse = _inverse(largest)[:, None]
    high = _nearest(tl.clamp(even * inverse, -1.0, 1.0), sorted_code, nibbles)
    low = _nearest(tl.clamp(odd * inverse, -1.0, 1.0), sorted_code, nibbles)
    tl.store(packed + byte, ((high << 4) | low).to(tl.uint8), 2 * byte < numel)


def quantize_4bit(weight, code, blocksize) -> tuple[torch.Tensor, torch.Tensor]:
    require(
        weight.dtype in FLOAT_DTYPES,
        f"weight: expected float32, bfloat16 or float16, got {weight.dtype}",
    )
    unpack = Unpack(weight)
    unpack.blocksize(blocksize)
    code = unpack.data("code", code, torch.float32, 16)
    weight, numel = weight.contiguous(), weight.numel()
    packed = weight.new_empty((ceil_div(numel, 2), 1), dtype=torch.uint8)
    absmax = weight.new_empty(ceil_div(numel, blocksize), dtype=torch.float32)
    blocks = max(1, 2048 // blocksize)
    launch(
        _quantize, ceil_div(absmax.numel(), blocks), weight, code, packed, absmax, numel,
        BLOCKSIZE=blocksize, BLOCKS=blocks, num_warps=4,
    )  # fmt: skip
    return packed, absmax


# -- double quantization ---------------------------------------------------------------------------


@triton.jit
def _partial_sums(absmax, partial, numel, SPAN: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SPAN + tl.arange(0, SPAN)
    values = tl.load(absmax + i, i < numel, 0.0).to(tl.float64)
    tl.store(partial + tl.program_id(0), tl.sum(values, 0))


@triton.jit
def _mean(partial, offset, spans, numel, SPAN: tl.constexpr):
    total = tl.zeros((SPAN,), tl.float64)
    for start in range(0, spans, SPAN):
        i = start + tl.arange(0, SPAN)
        total += tl.load(partial + i, i < spans, 0.0)
    count = tl.maximum(numel, 1).to(tl.float64)
    tl.store(offset, (tl.sum(total, 0) / count).to(tl.float32))


@triton.jit
def _double_quantize(absmax, nested_code, offset, quantized, nested_absmax, numel):
    """Each program: one block of 256 scales."""
    block = tl.program_id(0).to(tl.int64)
    i = block * 256 + tl.arange(0, 256)
    mask = i < numel
    value = tl.where(mask, tl.load(absmax + i, mask, 0.0) - tl.load(offset), 0.0)
    largest = tl.max(_magnitude(value), 0).to(tl.float32, bitcast=True)
    tl.store(nested_absmax + block, largest)
    value = value * _inverse(largest)
    # How many of the 255 midpoints between sorted codes lie below the value.
    below = tl.zeros((256,), tl.int32)
    for bit in tl.static_range(8):
        middle = below + (128 >> bit)
        low, high = tl.load(nested_code + (middle - 1)), tl.load(nested_code + middle)
        below = tl.where(value > (low + high) * 0.5, middle, below)
    tl.store(quantized + i, below.to(tl.uint8), mask)


def double_quantize(absmax, nested_code) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    unpack, numel = Unpack(absmax), absmax.numel()
    absmax = unpack.data("absmax", absmax.contiguous(), torch.float32, numel)
    nested_code = unpack.data("nested_code", nested_code, torch.float32, 256)
    spans, blocks = ceil_div(numel, SPAN), ceil_div(numel, NESTED_BLOCKSIZE)
    partial = absmax.new_empty(spans, dtype=torch.float64)
    offset = absmax.new_empty(())
    quantized = absmax.new_empty(numel, dtype=torch.uint8)
    nested_absmax = absmax.new_empty(blocks)
    launch(_partial_sums, spans, absmax, partial, numel, SPAN=SPAN)
    launch(_mean, 1, partial, offset, spans, numel, SPAN=1024)
    launch(_double_quantize, blocks, absmax, nested_code, offset, quantized, nested_absmax, numel)
    return quantized, nested_absmax, offset
