"""What only the suite compares: Unsloth's scheme, quantizing, and of many adapters torch's loops and vLLM's scheme."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

import lowrank_kernels as lk
from lowrank_kernels.benchmark import multi_providers as many
from lowrank_kernels.benchmark import providers as shared
from lowrank_kernels.benchmark.case import BLOCKSIZE, MIX, Case
from lowrank_kernels.benchmark.providers import SCALING, Calls, dense_weights, each, weights_4bit
from lowrank_kernels.codebooks import code_of, dynamic_code
from lowrank_kernels.multi_lora.functional import multi_lora_linear_4bit
from lowrank_kernels.schema import ops

# Its module while training: it dequantizes and multiplies in the dtype of x, everywhere.
linear_bitsandbytes_training = shared.provider(
    lambda x, module: module(x), shared.x_of, shared.bnb_modules
)


# -- the scheme of Unsloth -------------------------------------------------------------------------


def _addmm_forward(x, W, A, B):
    """y = x Wᵀ, then y += scaling (x Aᵀ) Bᵀ in place."""
    return F.linear(x, W()).addmm_(x @ A.to(x.dtype).T, B.to(x.dtype).T, alpha=SCALING)


def _addmm_both(x, dy, W, A, B):
    """Forward, then the gradients of x, A and B: x Aᵀ is not kept, and dx is added to in place."""
    _addmm_forward(x, W, A, B)
    A, B = A.to(x.dtype), B.to(x.dtype)
    dS = dy @ B
    dA = SCALING * (dS.T @ x)
    dB = SCALING * (dy.T @ (x @ A.T))
    return (dy @ W()).addmm_(dS, A, alpha=SCALING), dA, dB


def _addmm_calls(case: Case, weights: list[Callable[[], torch.Tensor]]) -> Calls:
    """Dense products around ``weights``, functions that give dense ones.

    Written out as its matmul_lora and LoRA_W do it, without autograd around it.
    """
    A, B = (t.detach() for t in shared.adapter_of(case))
    pairs = each(case, shared.x_of(case), weights)
    if case.op == "lora_linear_4bit":
        return [functools.partial(_addmm_forward, x, W, A, B) for x, W in pairs]
    triples = each(case, shared.dy_of(case), pairs)
    return [functools.partial(_addmm_both, x, dy, W, A, B) for dy, (x, W) in triples]


def lora_addmm_dense(case: Case) -> Calls:
    return _addmm_calls(case, [lambda w=w: w for w in dense_weights(case)])


def lora_addmm_dequantize(case: Case) -> Calls:
    dtype = case.torch_dtype
    return _addmm_calls(case, [lambda w=w: w.dequantize(dtype) for w in weights_4bit(case)])


def lora_addmm_bitsandbytes(case: Case) -> Calls:
    weights = shared.bnb_weights(case)
    return _addmm_calls(case, [lambda w=w: shared.bnb_dequantize(*w) for w in weights])


# -- quantize_4bit, dequantize_4bit ----------------------------------------------------------------


def _of(function: Callable, weights: Callable) -> Callable[[Case], Calls]:
    return lambda case: [functools.partial(function, weight) for weight in weights(case)]


def quantize_operators(case: Case) -> Calls:
    """The two operators inside quantize_4bit, without its look for a NaN, which waits."""
    code, nested_code = code_of("nf4", case.device), dynamic_code(case.device)

    def quantize(weight: torch.Tensor) -> lk.Weight4bit:
        packed, absmax = ops.quantize_4bit(weight, code, BLOCKSIZE)
        absmax, nested_absmax, offset = ops.double_quantize(absmax, nested_code)
        kind = (code, weight.shape, weight.dtype, "nf4", BLOCKSIZE)
        return lk.Weight4bit(packed, absmax, *kind, nested_absmax, nested_code, offset)

    return [functools.partial(quantize, weight) for weight in dense_weights(case)]


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


def _vllm_cpu(y, x, A, B, index):
    """What vllm/lora/ops/torch_ops does, written here after its source, not run from it.

    Shrink into a float32 buffer, expand into y; for prefill and decode alike. Each takes the adapter of every row
    out of the stack, which makes a copy, and casts that to the dtype of what it writes.
    """
    s = torch.zeros(len(x), A.shape[1], device=x.device)
    s[:] = SCALING * torch.einsum("bi,boi->bo", x.to(s.dtype), A[index].to(s.dtype))
    y[:] += torch.einsum("bi,boi->bo", s.to(y.dtype), B[index].to(y.dtype))
    return y


many_lowrank_padded = many.many_added(
    lk.multi_lora_, functools.partial(many.planned, rank=max(MIX))
)
many_loop = many.many_added(_loop, many.with_rows)
many_loop_in_place = many.many_added(many.loop_in_place, many.with_rows)
many_gather_bmm = many.many_added(_gather_bmm, _indexed)
many_vllm_cpu = many.many_added(_vllm_cpu, _indexed)
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


def _training(forward: Callable) -> Callable[[Case], Calls]:
    """``forward(x, w, triples)`` of every weight; a triple: rows, A, B."""

    def calls(case: Case) -> Calls:
        parameters = _parameters(case)
        triples = list(zip(many.segments(case), parameters[::2], parameters[1::2]))
        layers = [lambda x, w=w: forward(x, w, triples) for w in weights_4bit(case)]
        return shared.lora_calls(case, [(layer, parameters) for layer in layers])

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
