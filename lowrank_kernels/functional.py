"""The differentiable functions: argument checks, then a thin autograd.Function with one operator call each way."""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable

from . import int8
from .backends import check_batch_invariant
from .formats import Weight4bit
from .ragged import by_rows, is_ragged
from .schema import check_float, check_linear, check_lora, check_tensor, ops


def autocast(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that torch.autocast asks of matrix products, as nn.Linear has it."""
    device_type = x.device.type
    if (
        not x.is_meta  # torch has no autocast to ask about there
        and torch.is_autocast_enabled(device_type)
        and x.is_floating_point()
        and x.dtype != torch.float64
    ):
        return x.to(torch.get_autocast_dtype(device_type))
    return x


def _bias_gradient(dy: torch.Tensor, bias_dtype: torch.dtype) -> torch.Tensor:
    return dy.sum(0, dtype=torch.float32).to(bias_dtype)


class _Linear4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, *weight):
        ctx.save_for_backward(*weight[:6])
        ctx.dims = weight[6:]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return ops.linear_4bit(x, *weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        need_dx, need_dbias = ctx.needs_input_grad[:2]
        dx = ops.linear_4bit_dx(dy, *ctx.saved_tensors, *ctx.dims) if need_dx else None
        dbias = _bias_gradient(dy, ctx.bias_dtype) if need_dbias else None
        return dx, dbias, *([None] * 9)


class _LoRALinear4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, B, bias, seed, scaling, dropout_p, *weight):
        y, s = ops.lora_linear_4bit(x, *weight, A, B, scaling, bias, dropout_p, seed)
        ctx.save_for_backward(x, A, B, bias, seed, s, *weight[:6])
        ctx.scalars = scaling, dropout_p, weight[6:]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, A, B, bias, seed, s, *weight = ctx.saved_tensors
        scaling, dropout_p, dims = ctx.scalars
        needs = ctx.needs_input_grad[:4]
        grads = ops.lora_linear_4bit_backward(
            dy, x, s, *weight, *dims, A, B, scaling, bias, dropout_p, seed, *needs
        )
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *([None] * 12)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, B, bias, weight, seed, scaling, dropout_p):
        y, s = ops.lora_linear(x, weight, A, B, scaling, bias, dropout_p, seed)
        ctx.save_for_backward(x, A, B, bias, weight, seed, s)
        ctx.scalars = scaling, dropout_p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, A, B, bias, weight, seed, s = ctx.saved_tensors
        scaling, dropout_p = ctx.scalars
        needs = ctx.needs_input_grad[:4]
        grads = ops.lora_linear_backward(
            dy, x, s, weight, A, B, scaling, bias, dropout_p, seed, *needs
        )
        dweight = None
        if ctx.needs_input_grad[4]:
            dweight = (dy.to(weight.dtype).T @ x.to(weight.dtype)).contiguous()
        return (
            *(g if need else None for g, need in zip(grads, needs, strict=True)),
            dweight,
            *([None] * 3),
        )


def wants_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether the operator must be part of a graph; RuntimeError where there can be none."""
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors):
        return False
    if torch.jit.is_tracing():
        return False  # torch.jit.trace records operators, which TorchScript then runs without gradients
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "gradients under torch.func transforms (vmap, grad, jacrev, ...) are not implemented for 4-bit layers; "
            "use torch.autograd, or torch.no_grad() for vmap"
        )
    return True


def dropout_seed(dropout_p: float, device: torch.device) -> torch.Tensor | None:
    """A fresh Philox key from torch's generator, so torch.manual_seed and checkpointing reproduce the mask."""
    if dropout_p == 0.0:
        return None
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def linear_4bit(x: torch.Tensor, w: Weight4bit, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``y = x Wᵀ + bias`` with W in 4 bits; never expands W.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16; any leading shape, empty too. A nested tensor of either
            layout gives one of the same layout, here and in the functions below.
        w: the weight, ``[N, K]``, on x's device. Frozen: no gradient.
        bias: ``[N]`` floating, or None.

    Returns:
        ``[..., N]`` in x's dtype: accumulated in float32, rounded once. Differentiable in x and bias.
        Under torch.autocast x is cast first, as for nn.Linear.

    Raises:
        TypeError: x or bias is not a tensor of those dtypes, or w is not a Weight4bit.
        ValueError: shapes or devices do not fit; the message names the argument.
    """
    check_weight(w)
    if is_ragged(x):
        return by_rows(lambda rows: linear_4bit(rows, w, bias), x)
    check_tensor("x", x)
    x = autocast(x)
    N, K = w.shape
    check_linear(x, N, K, w.device, bias)
    rows = x.reshape(math.prod(x.shape[:-1]), K)
    needs_grad = wants_grad(x, bias)
    int8.check(x, w, needs_grad)
    check_batch_invariant(x)
    if needs_grad:
        y = _Linear4bit.apply(rows, bias, *w.op_args())
    else:
        y = ops.linear_4bit(rows, *w.op_args(), bias)
    return y.view(*x.shape[:-1], N)


def lora_linear_4bit(
    x: torch.Tensor,
    w: Weight4bit,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float = 1.0,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """``y = x Wᵀ + scaling · S Bᵀ + bias`` with ``S = dropout(x) Aᵀ``: base and adapter in one operator each way.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16.
        w: frozen 4-bit weight ``[N, K]``.
        A: ``[R, K]``; B: ``[N, R]``; any floating dtype, not necessarily x's. Gradients come in theirs.
        scaling: PEFT's ``lora_alpha / r`` (or ``/ sqrt(r)`` for rsLoRA).
        bias: ``[N]`` or None.
        dropout_p: probability that an element of x is dropped before A, ``0 <= p < 1``; kept ones are
            scaled by ``1 / (1 - p)``. The mask comes from Philox4x32-10 keyed by one draw of torch's
            generator, is made again in backward and never stored.

    Returns:
        ``[..., N]`` in x's dtype, accumulated in float32. Differentiable in x, A, B and bias. S is kept for
        backward in float32.

    Raises:
        TypeError, ValueError: as :func:`linear_4bit`, and for A, B, scaling, dropout_p.

    Source: LoRA (Hu et al. 2021), QLoRA (Dettmers et al. 2023); gradients
    ``dS = scaling dY B, dX = dY W + mask (dS A), dA = dSᵀ dropout(X), dB = scaling dYᵀ S``.
    """
    check_weight(w)
    if is_ragged(x):
        return by_rows(lambda rows: lora_linear_4bit(rows, w, A, B, scaling, bias, dropout_p), x)
    check_tensor("x", x)
    x = autocast(x)
    N, K = w.shape
    check_linear(x, N, K, w.device, bias)
    check_lora(x, N, K, A, B, scaling, dropout_p)
    rows = x.reshape(math.prod(x.shape[:-1]), K)
    needs_grad = wants_grad(x, A, B, bias)
    int8.check(x, w, needs_grad)
    check_batch_invariant(x)
    seed = dropout_seed(dropout_p, x.device)
    if needs_grad:
        y = _LoRALinear4bit.apply(
            rows, A, B, bias, seed, float(scaling), float(dropout_p), *w.op_args()
        )
    else:
        y, _ = ops.lora_linear_4bit(
            rows, *w.op_args(), A, B, float(scaling), bias, float(dropout_p), seed
        )
    return y.view(*x.shape[:-1], N)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float = 1.0,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """:func:`lora_linear_4bit` on a dense base: ``weight`` is ``[N, K]`` float32, bfloat16 or float16.

    Differentiable in x, A, B, bias, and in weight where it requires a gradient.
    """
    if is_ragged(x):
        return by_rows(lambda rows: lora_linear(rows, weight, A, B, scaling, bias, dropout_p), x)
    check_tensor("x", x)
    x = autocast(x)
    check_float("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected a matrix [N, K], got shape {tuple(weight.shape)}")
    N, K = weight.shape
    check_linear(x, N, K, weight.device, bias)
    check_lora(x, N, K, A, B, scaling, dropout_p)
    rows = x.reshape(math.prod(x.shape[:-1]), K)
    seed = dropout_seed(dropout_p, x.device)
    check_batch_invariant(x)
    if wants_grad(x, A, B, bias, weight):
        y = _LoRALinear.apply(rows, A, B, bias, weight, seed, float(scaling), float(dropout_p))
    else:
        y, _ = ops.lora_linear(rows, weight, A, B, float(scaling), bias, float(dropout_p), seed)
    return y.view(*x.shape[:-1], N)


def check_weight(w: object) -> None:
    if not isinstance(w, Weight4bit):
        raise TypeError(f"w: expected a Weight4bit (see quantize_4bit), got {type(w).__name__}")
