"""The kernel of all linear operators: one tile of base + adapter + bias, in float32, rounded once.

    forward   y  = x W^T + scaling S Bᵀ + bias
    backward  dx = dy W  + mask (dS A)

A sum that is too long for few programs is split along its depth (split-K): then each split is written in float32,
and a second kernel adds the splits in their order. The first split has adapter and bias.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..arguments import ceil_div
from . import dequant_dot
from .launch import launch, on_nvidia, precision_of
from .lora import Lora, add_splits, lora_tile
from .paged_lora import PagedLora, paged_lora_tile
from .primitives import rounded
from .tune import Config, choose
from .unpack import DTYPES, PackedWeight, pairs


@triton.jit(do_not_specialize=["M"])
def _matmul(
    x, w, adapter, bias, out, M, N, K, x_stride, w_stride, out_stride,
    dtype: tl.constexpr, BASE: tl.constexpr, BACKWARD: tl.constexpr, ADAPTER: tl.constexpr,
    SHIFT: tl.constexpr, PRECISION: tl.constexpr, PRMT: tl.constexpr,
    BM: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """x is dy where ``BACKWARD``: then columns are inputs and the depth are outputs.

    Rows run fastest over the programs: those that read the same part of the weight run at the same time.
    """
    J, depth = (K, N) if BACKWARD else (N, K)
    tiles_m = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    m0, j0 = pid % tiles_m * BM, pid // tiles_m % tl.cdiv(J, BJ) * BJ
    split = pid // tiles_m // tl.cdiv(J, BJ)
    steps = tl.cdiv(tl.cdiv(depth, BD), SPLIT_K)
    begin, end = split * steps, tl.minimum(split * steps + steps, tl.cdiv(depth, BD))
    m, j = m0 + tl.arange(0, BM), j0 + tl.arange(0, BJ)
    if BACKWARD:
        acc = dequant_dot.backward(
            x, w, x_stride, w_stride, m, j0, M, N, K, begin, end, 0, dtype, BASE, SHIFT, PRECISION, BM, BJ, BD
        )  # fmt: skip
    else:
        acc = dequant_dot.forward(
            x, w, x_stride, w_stride, m, j, M, N, K, begin, end, dtype, BASE, SHIFT, PRECISION, PRMT,
            BM, BJ, BD,
        )  # fmt: skip
    if split == 0:
        if ADAPTER == "PagedLora":
            acc += paged_lora_tile(adapter, m, j0, M, J, PRECISION, BM, BJ)
        elif ADAPTER == "Lora":
            acc += lora_tile(adapter, m, j0, M, J, PRECISION, BM, BJ)
        if bias is not None:
            acc += tl.load(bias + j, j < J, 0.0).to(tl.float32)[None, :]
    row = m.to(tl.int64) + split.to(tl.int64) * M
    at = row[:, None] * out_stride + j[None, :]
    tl.store(out + at, rounded(acc, out.dtype.element_ty), (m < M)[:, None] & (j < J)[None, :])


def kind_of(w: PackedWeight | torch.Tensor, K: int, blocksize: int | None) -> str:
    """How a base is read, see dequant_dot.py."""
    if isinstance(w, torch.Tensor):
        return "dense"
    return "runs" if K and K % blocksize == 0 else "elements"


def bucket_of(M: int) -> int:
    """Batches of up to this many rows are one family: they have the same tiles, and a row the same bits in each."""
    return next((limit for limit in (16, 32, 64) if limit >= M), 128)


def configs(kind: str, dtype: torch.dtype, M: int, J: int, depth: int) -> list[Config]:
    """A tile that spills nowhere and enough programs to keep a large GPU busy; then what else may be faster."""
    tensor_cores = kind == "runs" and dtype != torch.float32
    rows, programs = bucket_of(M), ceil_div(J, 64)
    if M > 64:
        split_k = 1
    elif tensor_cores:
        split_k = max(1, min(8, 512 // programs, depth // 512))
    else:
        split_k = max(1, min(8, 256 // programs, depth // 256))
    if not tensor_cores:
        first = Config(min(rows, 32), 64, 32, split_k, 4 if M <= 16 else 8, 2)
    else:
        first = Config(rows, 64, 64 if M <= 16 else 32, split_k, 4 if M <= 16 else 8, 3)
    others = [first._replace(stages=first.stages + 1), first._replace(columns=32)]
    if M <= 64:
        others += [
            first._replace(split_k=2 * split_k),
            first._replace(split_k=max(1, split_k // 2)),
        ]
    else:
        others += [first._replace(rows=rows // 2), first._replace(rows=rows // 2, columns=128)]
    return list(dict.fromkeys([first, *others]))


def matmul(
    x: torch.Tensor,
    w: PackedWeight | torch.Tensor,
    N: int,
    K: int,
    blocksize: int | None = None,
    adapter: Lora | PagedLora | None = None,
    bias: torch.Tensor | None = None,
    backward: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """base + adapter + bias for the rows of x (of dy, where ``backward``), in x's dtype unless given."""
    M, J, depth = x.shape[0], *((K, N) if backward else (N, K))
    dtype = dtype or x.dtype
    if M == 0 or J == 0:
        return x.new_empty((M, J), dtype=dtype)
    kind = kind_of(w, K, blocksize)
    left = pairs(x) if kind == "runs" and not backward else x

    def run(config: Config) -> torch.Tensor:
        rows, columns, step, split_k, warps, stages = config
        if kind == "runs" and backward:  # the side of a tile along a row is within a block
            columns = min(columns, blocksize)
        elif kind == "runs":
            step = min(step, blocksize)
        out = x.new_empty((M, J), dtype=dtype)
        target = out if split_k == 1 else out.new_empty((split_k, M, J), dtype=torch.float32)
        launch(
            _matmul, ceil_div(M, rows) * ceil_div(J, columns) * split_k,
            left, w, adapter, bias, target, M, N, K,
            left.stride(0), 0 if isinstance(w, PackedWeight) else w.stride(0), J,
            dtype=DTYPES[x.dtype], BASE=kind, BACKWARD=backward, ADAPTER=type(adapter).__name__,
            SHIFT=(blocksize or 1).bit_length() - 1, PRECISION=precision_of(x.dtype),
            PRMT=kind == "runs" and not backward and x.dtype != torch.float32 and on_nvidia(),
            BM=rows, BJ=columns, BD=step, SPLIT_K=split_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if split_k > 1:
            add_splits(target, out)
        return out

    names = kind, "backward" if backward else "forward", type(adapter).__name__, blocksize
    key = " ".join(map(str, (*names, f"N={N}", f"K={K}", f"M<={bucket_of(M)}", x.dtype)))
    return run(choose(key, configs(kind, x.dtype, M, J, depth), run, x.device))
