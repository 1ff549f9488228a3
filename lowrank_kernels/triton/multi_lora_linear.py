"""multi_lora.py on a base in 4 bits: y = x Wᵀ + bias + what each row's adapter adds, rounded once."""

from __future__ import annotations

import torch

from ..arguments import (
    PAGES_TENSORS,
    PagesArgs,
    PlanArgs,
    WeightArgs,
    each_given,
    each_pages,
    first_tensor,
    flat,
)
from .lora import column_sums
from .lora_linear import sum_of_parts
from .matmul import matmul
from .multi_lora import adapter_gradients, rows_of_adapters
from .paged_lora import PagedLora, unpack_batch
from .unpack import Unpack, entries, lengths, require


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


def _backward(
    dy, x, s, args: WeightArgs, plan: PlanArgs, pages: PagesArgs, bias,
    grad_rows, grad_rank, need_dx, need_dbias, dtype=None,
):  # fmt: skip
    """``dtype``: of dx, where not that of dy."""
    unpack, (N, K, blocksize) = Unpack(dy), (args.N, args.K, args.blocksize)
    require(dy.dim() == 2 and x.dim() == 2, "dy, x: expected matrices")
    w = unpack.weight(args)
    g = adapter_gradients(unpack, dy, x, s, plan, pages, N, K, grad_rows, grad_rank)
    dx, bias = dy.new_empty(0), unpack.vector("bias", bias, N)
    if need_dx:
        dx = matmul(g.dy, w, N, K, blocksize, g.through_adapters(), backward=True, dtype=dtype)
    dbias = (dy if bias is None else bias).new_empty(N if need_dbias else 0)
    if need_dbias:
        column_sums(dbias, g.dy)
    return dx, g.dA, g.dB, dbias


@flat
def multi_lora_linear_4bit_backward(
    dy, x, s, args: WeightArgs, plan: PlanArgs, pages: PagesArgs, bias,
    grad_rows, grad_rank, need_dx, need_dbias,
):  # fmt: skip
    return _backward(
        dy, x, s, args, plan, pages, bias, grad_rows, grad_rank, need_dx, need_dbias
    )  # fmt: skip


# -- several weights, one x ----------------------------------------------------------------------------------


def _group(first: torch.Tensor, weights, dims, pages, seed, bias) -> list[tuple]:
    """The weight, the pages and the bias of each."""
    group = Unpack(first).group(weights, dims)
    lengths(PAGES_TENSORS * len(group), pages=pages)
    entries("seed", seed, len(group))
    return list(zip(group, each_pages(pages, seed), entries("bias", bias, len(group))))


@flat
def multi_lora_linear_4bit_group(x, weights, dims, plan: PlanArgs, pages, seed, bias):
    group = _group(x, weights, dims, pages, seed, bias)
    outputs = [multi_lora_linear_4bit(x, *w, *plan, *own, b) for w, own, b in group]
    return tuple([output[i] for output in outputs] for i in (0, 1))


@flat
def multi_lora_linear_4bit_group_backward(
    dy, x, s, weights, dims, plan: PlanArgs, pages, seed, bias,
    grad_rows, grad_rank, need_dx, need_dbias,
):  # fmt: skip
    dys = each_given(dy, 0)
    first = first_tensor(dys)
    group = _group(first, weights, dims, pages, seed, bias)
    lists = {"grad_rows": grad_rows, "grad_rank": grad_rank, "need_dbias": need_dbias}
    lengths(len(group), dy=dy, s=s, **lists)
    parts = [
        None if dys[i] is None else _backward(
            dys[i], x, s[i], w, plan, own, b, grad_rows[i], grad_rank[i], need_dx, need_dbias[i],
            torch.float32,
        )
        for i, (w, own, b) in enumerate(group)
    ]  # fmt: skip
    float32 = [first.new_empty(0, dtype=torch.float32)] * len(group)
    return sum_of_parts(parts, first, need_dx, float32, float32, [b for *_, b in group])
