"""Weights that come in pieces: quantized, so that no more than a piece is dense at a time, or joined in 4 bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch

from .arguments import ceil_div
from .formats import (
    Weight4bit,
    check_quantization,
    finished,
    packed_and_absmax,
    stored_like,
)
from .reference import block_scales


def quantize_pieces(
    pieces: Iterable[torch.Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    quant_storage: torch.dtype = torch.uint8,
) -> Weight4bit:
    """The bytes of :func:`quantize_4bit` of a weight of ``shape``, whose elements come in order, on the CPU.

    Pieces may be of any shapes: what is left of one after whole blocks begins the next one's first block.

    Raises ValueError for a NaN or infinity, naming its index in the whole, and for more or fewer elements than
    ``shape`` has.

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> from lowrank_kernels.pieces import quantize_pieces
        >>> W = torch.randn(4, 6, 24)
        >>> w = quantize_pieces(iter(W), W.shape, W.dtype)
        >>> torch.equal(w.packed, lk.quantize_4bit(W).packed)
        True
    """
    shape = torch.Size(shape)
    code, count = check_quantization(quant_type, blocksize, quant_storage, "cpu"), shape.numel()
    packed = torch.empty(ceil_div(count, 2), dtype=torch.uint8)
    absmax = torch.empty(ceil_div(count, blocksize))
    done, left = 0, torch.empty(0, dtype=dtype)

    def put(flat: torch.Tensor) -> None:
        nonlocal done
        size = flat.numel()
        if size == 0:
            return
        bytes_, scales = packed_and_absmax(flat[None], code, blocksize, shape, done)
        packed[done // 2 :][: ceil_div(size, 2)] = bytes_.flatten()
        absmax[done // blocksize :][: scales.numel()] = scales
        done += size

    for piece in pieces:
        flat = piece.detach().reshape(-1)
        if done + left.numel() + flat.numel() > count:
            raise ValueError(f"pieces: expected {count} elements in all, got more")
        if left.numel():
            flat = torch.cat([left, flat])
        whole = flat.numel() // blocksize * blocksize
        put(flat[:whole])
        left = flat[whole:].clone()
    put(left)
    if done != count:
        raise ValueError(f"pieces: expected {count} elements in all, got {done}")
    args = shape, dtype, quant_type, blocksize
    return finished(packed[:, None], absmax, code, *args, double_quant, quant_storage)


def join(weights: Sequence[Weight4bit], shape: tuple[int, ...]) -> Weight4bit:
    """The weight of ``shape`` whose elements are those of ``weights``, one after the other; no value changes.

    Its scales are float32: double-quantized ones have a mean of each weight's own.

    Raises ValueError for weights of different settings, blocks that end within the next weight, and other counts of
    elements than ``shape`` has.

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> from lowrank_kernels.pieces import join
        >>> a, b = (lk.quantize_4bit(torch.randn(8, 64)) for _ in range(2))
        >>> w = join([a, b], (2, 8, 64))
        >>> torch.equal(w.dequantize(), torch.stack([a.dequantize(), b.dequantize()]))
        True
    """
    first, shape = weights[0], torch.Size(shape)

    def settings(w: Weight4bit) -> tuple:
        return w.quant_type, w.blocksize, w.dtype, w.packed.dtype

    for w in weights:
        if settings(w) != settings(first):
            raise ValueError(
                f"weights: expected the settings of the first, {settings(first)}, got {settings(w)}"
            )
        if w.shape.numel() % w.blocksize:
            raise ValueError(
                f"weights: expected whole blocks of {w.blocksize} elements, got shape {tuple(w.shape)}"
            )
    if sum(w.shape.numel() for w in weights) != shape.numel():
        shapes = sorted({tuple(w.shape) for w in weights})
        raise ValueError(
            f"weights: expected the elements of shape {tuple(shape)}, got {len(weights)} of shapes {shapes}"
        )
    packed = [w.packed.reshape(-1).view(torch.uint8)[: w.shape.numel() // 2] for w in weights]
    absmax = [
        block_scales(w.absmax, w.nested_absmax, w.nested_code, w.nested_offset) for w in weights
    ]
    return dataclasses.replace(
        first,
        packed=stored_like(first.packed, torch.cat(packed)),
        absmax=torch.cat(absmax),
        shape=shape,
        **dict.fromkeys(("nested_absmax", "nested_code", "nested_offset")),
    )
