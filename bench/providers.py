"""Implementations that only the suite compares: other ways to train, Unsloth's scheme, quantizing and dequantizing."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

import lowrank_kernels as lk
from lowrank_kernels.benchmark import providers as shared
from lowrank_kernels.benchmark.case import BLOCKSIZE, Case
from lowrank_kernels.benchmark.providers import SCALING, Calls, dense_weights, each, weights_4bit
from lowrank_kernels.codebooks import code_of, dynamic_code
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
