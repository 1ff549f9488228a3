"""A base, dense or in 4 bits, and one adapter: y = x Wᵀ + scaling S Bᵀ + bias with S = dropout(x) Aᵀ, and the
gradients of all but the base."""

from __future__ import annotations

import torch

from ..arguments import WeightArgs, flat
from .lora import backward_lora, column_sums, forward_lora, lora_rows, skinny
from .matmul import matmul
from .unpack import PackedWeight, Unpack, sizes


def _forward(
    unpack: Unpack, x, w: PackedWeight | torch.Tensor, N, K, blocksize, A, B, scaling, bias, p, seed
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and S, on either base."""
    M, R = x.shape[0], A.shape[0]
    sizes(M=M, R=R)
    x = unpack.matrix("x", x, M, K)
    A, B = unpack.matrix("A", A, R, K), unpack.matrix("B", B, N, R)
    s = lora_rows(x, A.T, 1.0, unpack.dropout(p, seed))
    adapter, bias = forward_lora(s, B, scaling), unpack.vector("bias", bias, N)
    return matmul(x, w, N, K, blocksize, adapter, bias), s


def _backward(
    unpack: Unpack, dy, x, s, w: PackedWeight | torch.Tensor, N, K, blocksize,
    A, B, scaling, bias, p, seed, need_dx, need_dA, need_dB, need_dbias,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dx, dA, dB, dbias, on either base; one that is not needed is empty."""
    M, R = dy.shape[0], A.shape[0]
    sizes(M=M, R=R)
    dy, x = unpack.matrix("dy", dy, M, N), unpack.matrix("x", x, M, K)
    s = unpack.data("s", s.contiguous(), torch.float32, M * R).view(M, R)
    A, B = unpack.matrix("A", A, R, K), unpack.matrix("B", B, N, R)
    dropout, bias = unpack.dropout(p, seed), unpack.vector("bias", bias, N)
    dx = dy.new_empty(0)
    dA, dB = A.new_empty((R, K) if need_dA else 0), B.new_empty((N, R) if need_dB else 0)
    dbias = (dy if bias is None else bias).new_empty(N if need_dbias else 0)
    if need_dx or need_dA:
        ds = lora_rows(dy, B, scaling, None)
    if need_dx:
        adapter = backward_lora(ds, A, dropout)
        dx = matmul(dy, w, N, K, blocksize, adapter, backward=True)
    if need_dA:
        skinny(dA.T, x.T, ds, 1.0, dropout, x_rows=False)
    if need_dB:
        skinny(dB, dy.T, s, scaling)
    if need_dbias:
        column_sums(dbias, dy)
    return dx, dA, dB, dbias


def _dense(unpack: Unpack, weight: torch.Tensor) -> tuple[torch.Tensor, int, int, None]:
    """The base as forward and backward take it: the matrix, N, K and no block size."""
    N, K = weight.shape
    sizes(N=N, K=K)
    return unpack.matrix("weight", weight, N, K), N, K, None


def _quantized(unpack: Unpack, w: WeightArgs) -> tuple[PackedWeight, int, int, int]:
    return unpack.weight(w), w.N, w.K, w.blocksize


def lora_linear(x, weight, *adapter) -> tuple[torch.Tensor, torch.Tensor]:
    unpack = Unpack(x)
    return _forward(unpack, x, *_dense(unpack, weight), *adapter)


def lora_linear_backward(dy, x, s, weight, *adapter):
    unpack = Unpack(dy)
    return _backward(unpack, dy, x, s, *_dense(unpack, weight), *adapter)


@flat
def lora_linear_4bit(x, w: WeightArgs, *adapter) -> tuple[torch.Tensor, torch.Tensor]:
    unpack = Unpack(x)
    return _forward(unpack, x, *_quantized(unpack, w), *adapter)


@flat
def lora_linear_4bit_backward(dy, x, s, w: WeightArgs, *adapter):
    unpack = Unpack(dy)
    return _backward(unpack, dy, x, s, *_quantized(unpack, w), *adapter)
