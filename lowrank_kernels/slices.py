"""Rows and columns of a 4-bit weight as weights of their own: :meth:`Weight4bit.narrow`."""

from __future__ import annotations

import dataclasses
import math

import torch

from .formats import BLOCKSIZES, Weight4bit
from .reference import block_scales
from .schema import NESTED_BLOCKSIZE, ceil_div

LEAST = BLOCKSIZES[0]  # elements that must stay together


def narrow(w: Weight4bit, dim: int, start: int, length: int) -> Weight4bit:
    """See :meth:`Weight4bit.narrow`.

    The slice is ``runs`` equal runs of the flat weight, ``run`` elements each, the first at ``first``, one every
    ``pitch``. Rows are one run. Each run begins with a block, which so must begin within the blocks of the whole.
    """
    _check(w, dim, start, length)
    N, K = w.shape
    if dim == 1 and N > 1 and length < K:
        shape, runs, run, first, pitch = (N, length), N, length, start, K
        fits = [b for b in BLOCKSIZES if start % b == length % b == K % b == 0]
    else:
        shape = (length, K) if dim == 0 else (N, length)
        runs, run, first, pitch = 1, math.prod(shape), start * (K if dim == 0 else 1), 0
        fits = [b for b in BLOCKSIZES if first % b == 0]
    fits = [b for b in fits if b <= w.blocksize]
    if not fits:
        raise ValueError(_misaligned(K, dim, start, length))
    blocksize = fits[-1]

    data, size = w.packed.reshape(-1).view(torch.uint8), ceil_div(run, 2)
    data = data.as_strided(
        (runs, size), (pitch // 2, 1), data.storage_offset() + first // 2
    ).flatten()
    starts = torch.arange(runs, device=w.device)[:, None] * pitch + first
    steps = torch.arange(ceil_div(run, blocksize), device=w.device) * blocksize
    blocks = (starts + steps).flatten() // w.blocksize
    first_block = first // w.blocksize
    if (
        w.double_quant
        and blocksize == w.blocksize
        and runs == 1
        and first_block % NESTED_BLOCKSIZE == 0
    ):
        nested = blocks[::NESTED_BLOCKSIZE] // NESTED_BLOCKSIZE
        scales = {"absmax": w.absmax[blocks], "nested_absmax": w.nested_absmax[nested]}
    else:
        absmax = block_scales(w.absmax, w.nested_absmax, w.nested_code, w.nested_offset)[blocks]
        nothing = dict.fromkeys(("nested_absmax", "nested_code", "nested_offset"))
        scales = {"absmax": absmax, **nothing}
    packed = _stored_like(w.packed, data)
    return dataclasses.replace(
        w, packed=packed, shape=torch.Size(shape), blocksize=blocksize, **scales
    )


def _check(w: Weight4bit, dim: object, start: object, length: object) -> None:
    if any(type(value) is not int for value in (dim, start, length)):
        raise TypeError(f"dim, start, length: expected integers, got {(dim, start, length)!r}")
    if dim not in (0, 1):
        raise IndexError(f"dim: expected 0 (rows) or 1 (columns), got {dim}")
    if start < 0 or length < 0 or start + length > w.shape[dim]:
        raise IndexError(
            f"start, length: expected a part of {w.shape[dim]} {'columns' if dim else 'rows'}, "
            f"got {length} from {start} on"
        )


def _misaligned(K: int, dim: int, start: int, length: int) -> str:
    if dim == 0:
        multiple = LEAST // math.gcd(K, LEAST)
        return f"start: expected a multiple of {multiple} for rows of {K} columns, got {start}"
    if K % LEAST:
        return f"dim: expected 0, since columns can be cut only where K is a multiple of {LEAST}, got 1 for K = {K}"
    return f"start, length: expected multiples of {LEAST} for columns, got {start}, {length}"


def _stored_like(packed: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """``data`` in the storage dtype and the orientation of ``packed``."""
    padded = data.new_zeros(ceil_div(data.numel(), packed.itemsize) * packed.itemsize)
    padded[: data.numel()] = data  # a copy, also of rows, which were a view
    data = padded.view(packed.dtype)
    row = packed.dim() == 2 and packed.shape[0] == 1 and packed.shape[1] > 1
    return data[None, :] if row else data[:, None]
