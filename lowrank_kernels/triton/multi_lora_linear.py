"""multi_lora.py on a base in 4 bits: y = x Wᵀ + bias + what each row's adapter adds, rounded once."""

from __future__ import annotations

import torch

from ..arguments import PagesArgs, PlanArgs, WeightArgs, flat
from .lora import column_sums
from .matmul import matmul
from .multi_lora import adapter_gradients, rows_of_adapters
from .paged_lora import PagedLora, unpack_batch
from .unpack import Unpack, require


@flat
def multi_lora_linear_4bit(
    x, args: WeightArgs, plan: PlanArgs, pages: PagesArgs, bias
) -> tuple[torch.Tensor, torch.Tensor]:
    unpack, (N, K, blocksize) = Unpack(x), (args.N, args.K, args.blocksize)
    require(x.dim() == 2, "x: expected a matrix")
    w, batch = unpack.weight(args), unpack_batch(unpack, plan, pages, x.shape[0], N, K)
    x, bias = unpack.matrix("x", x, x.shape[0], K), unpack.vector("bias", bias, N)
    s = rows_of_adapters(x, batch, batch.A)
    adapters = PagedLora(s, batch.s_stride, batch.plan, batch.B)
    return matmul(x, w, N, K, blocksize, adapters, bias), s


@flat
def multi_lora_linear_4bit_backward(
    dy, x, s, args: WeightArgs, plan: PlanArgs, pages: PagesArgs, bias,
    grad_rows, grad_rank, need_dx, need_dbias,
):  # fmt: skip
    unpack, (N, K, blocksize) = Unpack(dy), (args.N, args.K, args.blocksize)
    require(dy.dim() == 2 and x.dim() == 2, "dy, x: expected matrices")
    w = unpack.weight(args)
    g = adapter_gradients(unpack, dy, x, s, plan, pages, N, K, grad_rows, grad_rank)
    dx, bias = dy.new_empty(0), unpack.vector("bias", bias, N)
    if need_dx:
        dx = matmul(g.dy, w, N, K, blocksize, g.through_adapters(), backward=True)
    dbias = (dy if bias is None else bias).new_empty(N if need_dbias else 0)
    if need_dbias:
        column_sums(dbias, g.dy)
    return dx, g.dA, g.dB, dbias
