"""A base, dense or in 4 bits, and one adapter: y = x Wᵀ + scaling S Bᵀ + bias with S = dropout(x) Aᵀ, and the
gradients of all but the base."""

from __future__ import annotations

import torch

from ..arguments import WeightArgs, each_given, first_tensor, flat
from .lora import backward_lora, column_sums, forward_lora, lora_rows, skinny
from .matmul import matmul
from .unpack import PackedWeight, Unpack, entries, lengths, require, sizes


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
    A, B, scaling, bias, p, seed, need_dx, need_dA, need_dB, need_dbias, dtype=None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dx, dA, dB, dbias, on either base; one that is not needed is empty. ``dtype``: of dx, where not that of dy."""
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
        dx = matmul(dy, w, N, K, blocksize, adapter, backward=True, dtype=dtype)
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


# -- several weights, one x ----------------------------------------------------------------------------------


def _base_backward(unpack: Unpack, dy, w: WeightArgs, bias, need_dx, need_dbias, dtype):
    """dx and dbias of a weight without an adapter."""
    packed, N, K, blocksize = _quantized(unpack, w)
    dy, bias = unpack.matrix("dy", dy, dy.shape[0], N), unpack.vector("bias", bias, N)
    dx, none = dy.new_empty(0), dy.new_empty(0)
    dbias = (dy if bias is None else bias).new_empty(N if need_dbias else 0)
    if need_dx:
        dx = matmul(dy, packed, N, K, blocksize, backward=True, dtype=dtype)
    if need_dbias:
        column_sums(dbias, dy)
    return dx, none, none, dbias


def _adapters(group: list[WeightArgs], A, B, scaling, bias, dropout_p, seed) -> list[tuple]:
    """A, B, scaling, bias, dropout_p and seed of each weight; A is None where it has no adapter."""
    count = len(group) if len(A) else 0
    lengths(count, A=A, B=B, scaling=scaling, dropout_p=dropout_p)
    seeds, none = entries("seed", seed, count), [None] * len(group)
    A, B = each_given(A, len(group)), each_given(B, len(group))
    of = A, B, scaling or none, entries("bias", bias, len(group)), dropout_p or none, seeds or none
    for a, b in zip(A, B):
        require(
            (a is None) == (b is None), "B: expected shape [0] where A has it, and nowhere else"
        )
    return list(zip(*of))


def lora_linear_4bit_group(x, weights, dims, *loras) -> tuple[list, list]:
    unpack = Unpack(x)
    group = unpack.group(weights, dims)
    M, ys, ss = x.shape[0], [], []
    sizes(M=M)
    for w, adapter in zip(group, _adapters(group, *loras)):
        packed, N, K, blocksize = _quantized(unpack, w)
        if adapter[0] is None:
            rows, bias = unpack.matrix("x", x, M, K), unpack.vector("bias", adapter[3], N)
            y = matmul(rows, packed, N, K, blocksize, bias=bias)
            s = x.new_empty((M, 0), dtype=torch.float32)
        else:
            y, s = _forward(unpack, x, packed, N, K, blocksize, *adapter)
        ys.append(y)
        ss.append(s)
    return ys, ss


def lora_linear_4bit_group_backward(
    dy, x, s, weights, dims, A, B, scaling, bias, dropout_p, seed,
    need_dx, need_dA, need_dB, need_dbias,
):  # fmt: skip
    dys = each_given(dy, 0)
    first = first_tensor(dys)
    unpack = Unpack(first)
    group = unpack.group(weights, dims)
    needs = {"need_dA": need_dA, "need_dB": need_dB, "need_dbias": need_dbias}
    lengths(len(group), dy=dy, s=s, **needs)
    adapters, parts = _adapters(group, A, B, scaling, bias, dropout_p, seed), []
    for i, (w, adapter) in enumerate(zip(group, adapters)):
        if dys[i] is None:
            parts.append(None)
        elif adapter[0] is None:
            of = need_dx, need_dbias[i], torch.float32
            parts.append(_base_backward(unpack, dys[i], w, adapter[3], *of))
        else:
            require(x is not None, "x: expected a tensor where there is an adapter, got None")
            of = need_dx, need_dA[i], need_dB[i], need_dbias[i], torch.float32
            parts.append(_backward(unpack, dys[i], x, s[i], *_quantized(unpack, w), *adapter, *of))
    likes = ([adapter[i] for adapter in adapters] for i in (0, 1, 3))
    return sum_of_parts(parts, first, need_dx, *likes)


def sum_of_parts(parts: list[tuple | None], like: torch.Tensor, need_dx: bool, *likes):
    """dx, the sum of the float32 dx of each part, rounded once; and lists of the other gradients of each.

    A part that is None has empty gradients, in the dtypes of its ``likes``.
    """
    dx = like.new_empty(0)
    if need_dx:
        first, *others = [part[0] for part in parts if part is not None]
        for other in others:
            first += other
        dx = first.to(like.dtype)

    def gradients(i: int) -> list[torch.Tensor]:
        of = [like if t is None else t for t in likes[i - 1]]
        return [t.new_empty(0) if part is None else part[i] for part, t in zip(parts, of)]

    return dx, gradients(1), gradients(2), gradients(3)
