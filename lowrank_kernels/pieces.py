"""Quantizes a weight that comes piece by piece, so that no more than a piece of it is dense at a time."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .arguments import ceil_div
from .formats import Weight4bit, check_quantization, finished, packed_and_absmax


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
