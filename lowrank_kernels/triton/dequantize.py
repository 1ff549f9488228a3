"""W[n, k] = code[nibble] scale, double-quantized scales in the same pass; the bits of the reference."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..arguments import FLOAT_DTYPES, WeightArgs, ceil_div, flat
from .launch import launch
from .primitives import block_scale, rounded
from .unpack import Unpack, require


@triton.jit
def _dequantize(w, out, numel, SHIFT: tl.constexpr, BYTES: tl.constexpr):
    """Each program decodes ``BYTES`` packed bytes: a block of the format is longer than a byte, so that one scale
    serves both nibbles."""
    i = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    mask = i < (numel + 1) // 2
    packed = tl.load(w.packed + i, mask, 0)
    scale = block_scale(w, (2 * i) >> SHIFT, mask)
    even = tl.load(w.code + (packed >> 4)) * scale
    odd = tl.load(w.code + (packed & 15)) * scale
    dtype: tl.constexpr = out.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    tl.store(out + at, tl.interleave(rounded(even, dtype), rounded(odd, dtype)), at < numel)


@flat
def dequantize_4bit(args: WeightArgs, dtype: torch.dtype) -> torch.Tensor:
    require(dtype in FLOAT_DTYPES, f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    w = Unpack(args.packed).weight(args)
    out, numel = w.code.new_empty((args.N, args.K), dtype=dtype), args.N * args.K
    shift, programs = args.blocksize.bit_length() - 1, ceil_div(ceil_div(numel, 2), 1024)
    launch(_dequantize, programs, w, out, numel, SHIFT=shift, BYTES=1024, num_warps=4)
    return out
