"""W[n, k] = code[nibble] scale, double-quantized scales in the same pass; the bits of the reference."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..schema import ceil_div
from .arguments import Unpack
from .elements import block_scale, rounded
from .launch import launch


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


def dequantize_4bit(*args) -> torch.Tensor:
    *weight, N, K, blocksize, dtype = args
    w = Unpack(weight[0]).weight(*weight, N, K, blocksize)
    out = w.code.new_empty((N, K), dtype=dtype)
    shift = blocksize.bit_length() - 1
    programs = ceil_div(ceil_div(N * K, 2), 1024)
    launch(_dequantize, programs, w, out, N * K, SHIFT=shift, BYTES=1024, num_warps=4)
    return out
