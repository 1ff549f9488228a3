"""What many adapters in one batch are compared with: torch's loops and gathers, vLLM's scheme, other calls of ours."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

import lowrank_kernels as lk
from lowrank_kernels.benchmark import multi_providers as shared
from lowrank_kernels.benchmark.case import MIX, Case
from lowrank_kernels.benchmark.providers import SCALING, Calls, lora_calls, weights_4bit
from lowrank_kernels.multi_lora.functional import multi_lora_linear_4bit

# -- y += each row's adapter -----------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _stacked(pool: shared.Pool, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A [adapters, R, K] and B [adapters, N, R] with R the largest rank, zeros past an adapter's own."""
    R = max(pool.ranks)
    A = torch.stack([F.pad(A, (0, 0, 0, R - len(A))) for A, _ in shared.adapters_of(pool)])
    B = torch.stack([F.pad(B, (0, R - B.shape[1])) for _, B in shared.adapters_of(pool)])
    return [(A.clone(), B.clone()) for _ in range(count)]


def _indexed(case: Case) -> list[tuple]:
    """(A and B of all adapters, the adapter of each row), for every turn."""
    count = shared.pool_copies(case, max(case.ranks))
    pool, rows = _stacked(shared.pool_of(case), count), torch.tensor(case.rows)
    indices = [
        torch.tensor(shared.group_of(case, g)).repeat_interleave(rows).to(case.device)
        for g in range(case.groups)
    ]
    return [(*pool[c], indices[group]) for c, group in shared.turns(case, count)]


def _loop(y, x, *adapters):
    for rows, A, B in adapters:
        y[rows] += SCALING * (x[rows] @ A.T) @ B.T
    return y


def _gather_bmm(y, x, A, B, index):
    s = torch.bmm(A.index_select(0, index), x.unsqueeze(2))
    return y.add_(torch.bmm(B.index_select(0, index), s).squeeze(2), alpha=SCALING)


def _vllm_cpu(y, x, A, B, index):
    """What vllm/lora/ops/torch_ops does, written here after its source, not run from it.

    Shrink into a float32 buffer, expand into y; for prefill and decode alike. Each takes the adapter of every row
    out of the stack, which makes a copy, and casts that to the dtype of what it writes.
    """
    s = torch.zeros(len(x), A.shape[1], device=x.device)
    s[:] = SCALING * torch.einsum("bi,boi->bo", x.to(s.dtype), A[index].to(s.dtype))
    y[:] += torch.einsum("bi,boi->bo", s.to(y.dtype), B[index].to(y.dtype))
    return y


many_lowrank_padded = shared.many_added(
    lk.multi_lora_, functools.partial(shared.planned, rank=max(MIX))
)
many_loop = shared.many_added(_loop, shared.with_rows)
many_loop_in_place = shared.many_added(shared.loop_in_place, shared.with_rows)
many_gather_bmm = shared.many_added(_gather_bmm, _indexed)
many_vllm_cpu = shared.many_added(_vllm_cpu, _indexed)
# The base, then its adapters, in two operators.
many_linear_separate = shared.many_linear(
    lambda x, w, *turn: lk.multi_lora_(lk.linear_4bit(x, w), x, *turn), shared.planned
)


# -- training: forward and the gradients of x and of every A and B ---------------------------------


def _parameters(case: Case) -> list[torch.Tensor]:
    """A and B of each adapter of the batch, in turn."""
    adapters = shared.adapters_of(shared.pool_of(case))[: len(case.rows)]
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
    return lora_calls(case, calls)


def _training(forward: Callable) -> Callable[[Case], Calls]:
    """``forward(x, w, triples)`` of every weight; a triple: rows, A, B."""

    def calls(case: Case) -> Calls:
        parameters = _parameters(case)
        triples = list(zip(shared.segments(case), parameters[::2], parameters[1::2]))
        layers = [lambda x, w=w: forward(x, w, triples) for w in weights_4bit(case)]
        return lora_calls(case, [(layer, parameters) for layer in layers])

    return calls


def _deltas(x: torch.Tensor, triples: list[tuple]) -> torch.Tensor:
    return torch.cat([SCALING * F.linear(F.linear(x[rows], A), B) for rows, A, B in triples])


def _one_by_one(x, w, triples):
    return torch.cat([lk.lora_linear_4bit(x[r], w, A, B, SCALING) for r, A, B in triples])


many_training_one_by_one = _training(_one_by_one)
many_training_loop = _training(lambda x, w, triples: lk.linear_4bit(x, w) + _deltas(x, triples))
many_training_dequantize = _training(
    lambda x, w, triples: F.linear(x, w.dequantize(x.dtype)) + _deltas(x, triples)
)
