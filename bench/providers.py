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
from lowrank_kernels.multi_lora.functional import multi_lora_linear_4bit


def linear_int8(case: Case) -> Calls:
    if not lk.backends.report()["int8"]:
        raise shared.Unavailable("this CPU has neither AVX512-VNNI nor AVX-VNNI")
    return shared.linear_lowrank(case)


# bitsandbytes' module while training: it dequantizes and multiplies in the dtype of x, everywhere.
linear_bitsandbytes_training = shared.provider(
    lambda x, module: module(x), shared.x_of, shared.bnb_modules
)


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


# -- training: forward and the gradients of x and of every A and B ---------------------------------


def _parameters(case: Case) -> list[torch.Tensor]:
    """A and B of each adapter of the batch, in turn."""
    adapters = many.adapters_of(many.pool_of(case))[: len(case.rows)]
    return [t.detach().clone().requires_grad_() for pair in adapters for t in pair]


def _trainable_layer(case: Case, w: lk.Weight4bit) -> lk.LoRALinear4bit:
    """A layer with the batch's adapters as its own, named "0", "1", ..."""
    layer, values = lk.LoRALinear4bit.from_weight(w), iter(_parameters(case))
    for u, rank in enumerate(case.ranks):
        layer.add_adapter(str(u), rank, lora_alpha=SCALING * rank)
        for parameter in layer.adapter_parameters(str(u)):
            parameter.data = next(values).detach()
    return layer


def many_training_lowrank(case: Case) -> Calls:
    """The layers' call under a plan whose adapters are the model's own and want gradients."""
    layers = {f"layer{i}": _trainable_layer(case, w) for i, w in enumerate(weights_4bit(case))}
    names = [str(u) for u in range(len(case.rows))]
    bank = lk.AdapterBank(layers, sum(-(-rank // 8) for rank in case.ranks))
    for name in names:
        bank.load(name)
    bank.trainable(*names)
    plan, calls = bank.plan(names, case.rows), []
    for name, layer in layers.items():
        rest = {"w": layer.weight4bit, "plan": plan, "pages": bank[name]}
        parameters = [t for n in names for t in layer.adapter_parameters(n)]
        calls.append((functools.partial(multi_lora_linear_4bit, **rest), parameters))
    return shared.lora_calls(case, calls)


def many_training_loop(case: Case) -> Calls:
    """The base in 4 bits, and torch's products for each adapter."""
    parameters = _parameters(case)
    triples = list(zip(many.segments(case), parameters[::2], parameters[1::2]))

    def forward(w: lk.Weight4bit, x: torch.Tensor) -> torch.Tensor:
        added = [SCALING * F.linear(F.linear(x[rows], A), B) for rows, A, B in triples]
        return lk.linear_4bit(x, w) + torch.cat(added)

    layers = [functools.partial(forward, w) for w in weights_4bit(case)]
    return shared.lora_calls(case, [(layer, parameters) for layer in layers])
