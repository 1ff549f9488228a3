"""What only the suite compares: int8 activations, quantizing, and of many adapters torch's loops."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

import lowrank_kernels as lk
from lowrank_kernels.benchmark import multi_providers as many
from lowrank_kernels.benchmark import providers as shared
from lowrank_kernels.benchmark.case import BLOCKSIZE, Case
from lowrank_kernels.benchmark.providers import SCALING, Calls, dense_weights, weights_4bit


def linear_int8(case: Case) -> Calls:
    if not lk.backends.report()["int8"]:
        raise shared.Unavailable(
            "this CPU has neither AVX512-VNNI nor AVX-VNNI nor dot products of NEON"
        )
    return shared.linear_lowrank(case)


# -- quantize_4bit, dequantize_4bit ----------------------------------------------------------------


def _of(function: Callable, weights: Callable) -> Callable[[Case], Calls]:
    return lambda case: [functools.partial(function, weight) for weight in weights(case)]


def quantize_bitsandbytes(case: Case) -> Calls:
    quantize = shared.bitsandbytes(case.device).functional.quantize_4bit
    options = {"blocksize": BLOCKSIZE, "quant_type": "nf4", "compress_statistics": True}
    return _of(functools.partial(quantize, **options), dense_weights)(case)


quantize_lowrank = _of(lk.quantize_4bit, dense_weights)
dequantize_lowrank = _of(lambda w: w.dequantize(w.dtype), weights_4bit)
dequantize_bitsandbytes = _of(lambda w: shared.bnb_dequantize(*w), shared.bnb_weights)


# -- many adapters: y += each row's ---------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _stacked(pool: many.Pool, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A [adapters, R, K] and B [adapters, N, R] with R the largest rank, zeros past an adapter's own."""
    R = max(pool.ranks)
    A = torch.stack([F.pad(A, (0, 0, 0, R - len(A))) for A, _ in many.adapters_of(pool)])
    B = torch.stack([F.pad(B, (0, R - B.shape[1])) for _, B in many.adapters_of(pool)])
    return [(A.clone(), B.clone()) for _ in range(count)]


def _indexed(case: Case) -> list[tuple]:
    """(A and B of all adapters, the adapter of each row), for every turn."""
    count = many.pool_copies(case, max(case.ranks))
    pool, rows = _stacked(many.pool_of(case), count), torch.tensor(case.rows)
    indices = [
        torch.tensor(many.group_of(case, g)).repeat_interleave(rows).to(case.device)
        for g in range(case.groups)
    ]
    return [(*pool[c], indices[group]) for c, group in many.turns(case, count)]


def _loop(y, x, *adapters):
    for rows, A, B in adapters:
        y[rows] += SCALING * (x[rows] @ A.T) @ B.T
    return y


def _gather_bmm(y, x, A, B, index):
    s = torch.bmm(A.index_select(0, index), x.unsqueeze(2))
    return y.add_(torch.bmm(B.index_select(0, index), s).squeeze(2), alpha=SCALING)


many_loop = many.many_added(_loop, many.with_rows)
many_loop_in_place = many.many_added(many.loop_in_place, many.with_rows)
many_gather_bmm = many.many_added(_gather_bmm, _indexed)
# The base, then its adapters, in two operators.
many_linear_separate = many.many_linear(
    lambda x, w, *turn: lk.multi_lora_(lk.linear_4bit(x, w), x, *turn), many.planned
)
