"""multi_lora.py on a base in 4 bits: y = x Wᵀ + bias + what each row's adapter adds, rounded once."""

from __future__ import annotations

import torch

from .adapter import column_sums
from .adapters import Adapters, unpack_batch
from .arguments import Unpack, require
from .multi_lora import adapter_gradients, rows_of_adapters, unpack_backward
from .product import product


def multi_lora_linear_4bit(x, *args) -> tuple[torch.Tensor, torch.Tensor]:
    unpack, weight, (N, K, blocksize), bias = Unpack(x), args[:9], args[6:9], args[-1]
    require(x.dim() == 2, "x: expected a matrix")
    w, batch = unpack.weight(*weight), unpack_batch(unpack, args[9:], x.shape[0], N, K)
    x, bias = unpack.matrix("x", x, x.shape[0], K), unpack.vector("bias", bias, N)
    s = rows_of_adapters(x, batch, batch.A)
    adapters = Adapters(s, batch.s_stride, batch.plan, batch.B)
    return product(x, w, N, K, blocksize, adapters, bias), s


def multi_lora_linear_4bit_backward(dy, x, s, *args):
    unpack, weight, (N, K, blocksize) = Unpack(dy), args[:9], args[6:9]
    *args, bias, grad_rows, grad_rank, need_dx, need_dbias = args[9:]
    require(dy.dim() == 2 and x.dim() == 2, "dy, x: expected matrices")
    w = unpack.weight(*weight)
    args = (*args, grad_rows, grad_rank)
    dy, x, s, batch, *grad = unpack_backward(unpack, dy, x, s, args, N, K)
    ds, dA, dB = adapter_gradients(dy, x, s, batch, *grad)
    dx = dy.new_empty(0)
    if need_dx:
        adapters = Adapters(ds, batch.s_stride, batch.plan, batch.A)
        dx = product(dy, w, N, K, blocksize, adapters, backward=True)
    dbias = (dy if bias is None else bias).new_empty(N if need_dbias else 0)
    if need_dbias:
        column_sums(dbias, dy)
    return dx, dA, dB, dbias
