"""Torch tensors to what the kernels take. As in csrc/ops/arguments.h: users' mistakes are found in schema.py, and
here only what memory safety needs is checked again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl

from ..arguments import (
    BLOCKSIZES,
    FLOAT_DTYPES,
    WEIGHT_SIZES,
    WEIGHT_TENSORS,
    WeightArgs,
    each_given,
    each_weight,
)

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class PackedWeight(NamedTuple):
    """A weight in 4 bits as the kernels take it; without double quantization the nested ones are None."""

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    nested_absmax: torch.Tensor | None
    nested_code: torch.Tensor | None
    nested_offset: torch.Tensor | None


class Dropout(NamedTuple):
    """Element (m, k) is kept, times ``scale``, when its word of Philox is at least ``threshold``."""

    seed: torch.Tensor
    threshold: int
    scale: float


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def sizes(**named: int) -> None:
    """Products of sizes are computed in 64 bits, a size itself in 32."""
    for name, value in named.items():
        require(0 <= value < 2**31, f"{name}: expected a size below 2^31, got {value}")


def lengths(count: int, **lists: Sequence) -> None:
    """A group of weights has lists with an entry for each."""
    for name, values in lists.items():
        require(len(values) == count, f"{name}: expected {count} entries, got {len(values)}")


def entries(name: str, tensors: Sequence[torch.Tensor], count: int) -> list[torch.Tensor | None]:
    """Those of a list that may be empty: then no weight has one."""
    if len(tensors):
        lengths(count, **{name: tensors})
    return each_given(tensors, count)


class Unpack:
    """Checks the tensors of one call, all of which must be where the first one is."""

    def __init__(self, first: torch.Tensor):
        self.device = first.device

    def on_device(self, name: str, t: torch.Tensor) -> None:
        require(
            t.device == self.device,
            f"{name}: expected a tensor on {self.device}, got one on {t.device}",
        )

    def matrix(self, name: str, t: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
        """``t`` itself, or a copy with rows that lie element by element."""
        self.on_device(name, t)
        require(
            t.dtype in FLOAT_DTYPES, f"{name}: expected float32, bfloat16 or float16, got {t.dtype}"
        )
        require(
            tuple(t.shape) == (rows, cols),
            f"{name}: expected shape [{rows}, {cols}], got {tuple(t.shape)}",
        )
        dense = (cols <= 1 or t.stride(1) == 1) and (rows <= 1 or t.stride(0) >= cols)
        return t if dense else t.contiguous()

    def vector(self, name: str, t: torch.Tensor | None, size: int) -> torch.Tensor | None:
        if t is None:
            return None
        self.on_device(name, t)
        require(
            t.dtype in FLOAT_DTYPES and t.dim() == 1 and t.numel() == size,
            f"{name}: expected {size} floating elements, got {t.dtype} {tuple(t.shape)}",
        )
        return t.contiguous()

    def data(self, name: str, t: torch.Tensor, dtype: torch.dtype, numel: int) -> torch.Tensor:
        self.on_device(name, t)
        require(
            t.dtype == dtype and t.numel() == numel and t.is_contiguous(),
            f"{name}: expected {numel} contiguous elements of {dtype}, got {t.numel()} of {t.dtype}",
        )
        return t

    def blocksize(self, blocksize: int) -> int:
        require(
            blocksize in BLOCKSIZES, f"blocksize: expected one of {BLOCKSIZES}, got {blocksize}"
        )
        return blocksize

    def weight(self, w: WeightArgs) -> PackedWeight:
        self.blocksize(w.blocksize)
        sizes(N=w.N, K=w.K)
        tensors = dict.fromkeys(PackedWeight._fields)
        for name, (dtype, numel) in w.expected().items():
            value = getattr(w, name)
            require(value is not None, f"{name}: expected a tensor like nested_absmax, got None")
            tensors[name] = self.data(name, value, dtype, numel)
        tensors["packed"] = w.packed.flatten().view(torch.uint8)
        return PackedWeight(**tensors)

    def group(self, weights: Sequence, dims: Sequence[int]) -> list[WeightArgs]:
        """The weights of a group, whose own tensors are not checked yet."""
        count = len(dims) // WEIGHT_SIZES
        require(count > 0, f"dims: expected N, K and blocksize of each weight, got {len(dims)}")
        lengths(WEIGHT_SIZES * count, dims=dims)
        lengths(WEIGHT_TENSORS * count, weights=weights)
        found = each_weight(weights, dims)
        for w in found:
            require(w.K == found[0].K, f"dims: expected one K, got {found[0].K} and {w.K}")
        return found

    def dropout(self, p: float, seed: torch.Tensor | None) -> Dropout | None:
        if p == 0.0:
            return None
        require(
            0.0 < p < 1.0 and seed is not None,
            f"dropout_p: expected 0 <= p < 1 and a seed, got {p}",
        )
        return Dropout(self.data("seed", seed, torch.int64, 1), int(p * 2.0**32), 1.0 / (1.0 - p))


def pairs(t: torch.Tensor) -> torch.Tensor:
    """Rows of an even length with two neighbours as one integer; a copy only where they lie askew."""
    integer = torch.int64 if t.dtype == torch.float32 else torch.int32
    if t.stride(0) % 2 or t.data_ptr() % integer.itemsize or t.storage_offset() % 2:
        t = t.clone(memory_format=torch.contiguous_format)
    return t.view(integer)
