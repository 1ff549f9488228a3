"""The differentiable functions: argument checks, then a thin autograd.Function with one operator call each way."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad

from . import backends, int8
from .formats import Weight4bit
from .ragged import by_rows, is_ragged, layout_error
from .schema import FLOAT_DTYPES, check_float, check_linear, check_lora, check_tensor, ops


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


def taken(x: torch.Tensor, w: Weight4bit) -> torch.Tensor:
    """x of a layer whose weight is ``w``, checked, in the dtype that torch.autocast asks for."""
    if isinstance(x, torch.Tensor):
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = autocast(x)
        if x.layout is not torch.strided:
            raise layout_error(x)
        fits = x.dtype in FLOAT_DTYPES and x.dim() > 0 and x.shape[-1] == w.shape[1]
        if fits and x.device == w.packed.device:
            return x
    check_linear(x, *w.shape, w.device, None)
    return x


def bias_gradient(dy: torch.Tensor, bias_dtype: torch.dtype) -> torch.Tensor:
    return dy.sum(0, dtype=torch.float32).to(bias_dtype)


class _Refuse(torch.autograd.Function):
    """The first ``count`` tensors, as functions of the others whose derivatives raise."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "trying to differentiate twice: gradients of gradients are not implemented for 4-bit layers and their "
            "adapters"
        )


def differentiable_once(backward: Callable) -> Callable:
    """Makes ``backward(ctx, saved, *dy)`` the backward of a Function: gradients of its gradients raise RuntimeError.

    ``saved`` is ``ctx.saved_tensors``, which may be read only once. torch's own ``once_differentiable`` raises
    where ``backward()`` walks the whole graph. ``torch.autograd.grad`` and all that stands on it walk only the paths
    to their inputs, find none, and take the derivative for zero.
    """

    @functools.wraps(backward)
    def run(ctx, *dys):
        saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = backward(ctx, saved, *dys)
        if (
            not torch.is_grad_enabled() or torch.compiler.is_compiling()
        ):  # whose backward is torch's
            return gradients
        found = [g for g in gradients if g is not None]
        refusing = iter(_Refuse.apply(len(found), *found, *dys, *saved))
        return tuple(None if g is None else next(refusing) for g in gradients)

    return run


class _Linear4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, *weight):
        ctx.save_for_backward(*weight[:6])
        ctx.dims = weight[6:]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return ops.linear_4bit(x, *weight, bias)

    @staticmethod
    @differentiable_once
    def backward(ctx, weight, dy):
        need_dx, need_dbias = ctx.needs_input_grad[:2]
        dx = ops.linear_4bit_dx(dy, *weight, *ctx.dims) if need_dx else None
        dbias = bias_gradient(dy, ctx.bias_dtype) if need_dbias else None
        return dx, dbias, *([None] * 9)


class _LoRALinear4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, B, bias, seed, scaling, dropout_p, *weight):
        y, s = ops.lora_linear_4bit(x, *weight, A, B, scaling, bias, dropout_p, seed)
        ctx.save_for_backward(x, A, B, bias, seed, s, *weight[:6])
        ctx.scalars = scaling, dropout_p, weight[6:]
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dy):
        x, A, B, bias, seed, s, *weight = saved
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
    @differentiable_once
    def backward(ctx, saved, dy):
        x, A, B, bias, weight, seed, s = saved
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


def wants_grad(x: torch.Tensor, w: Weight4bit | None, *others: torch.Tensor | None) -> bool:
    """Whether the operator must be part of a graph, for any of these tensors; ``w``: its 4-bit base, if it has one.

    Raises RuntimeError where there can be no graph, for a tensor with a tangent, and where int8 activations or batch
    invariance were asked for and cannot be had.
    """
    needed, inputs = False, (x, *others)
    if torch.is_grad_enabled():
        for tensor in inputs:
            if tensor is not None and tensor.requires_grad:
                needed = True
    if needed and torch.jit.is_tracing():
        needed = False  # torch.jit.trace records operators, which TorchScript then runs without gradients
    if forward_ad._current_level >= 0:
        _refuse_tangents(inputs)
    if backends.kernel_in_force == "invariant":
        backends.check_cpu_kernels("batch_invariant", x)
    if w is not None and getattr(int8.state, "active", False):
        int8.check(x, w, needed)
    if needed and not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "gradients under torch.func transforms (vmap, grad, jacrev, ...) are not implemented for 4-bit layers; "
            "use torch.autograd, or torch.no_grad() for vmap"
        )
    return needed


def _refuse_tangents(tensors: Sequence[torch.Tensor | None]) -> None:
    functorch = torch._C._functorch
    for tensor in tensors:
        while tensor is not None and functorch.is_batchedtensor(tensor):  # of vmap
            tensor = functorch.get_unwrapped(tensor)
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                "forward-mode derivatives (torch.func.jvp, jacfwd, linearize, torch.autograd.forward_ad) are not "
                "implemented for 4-bit layers and their adapters; use torch.autograd"
            )


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

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> w = lk.quantize_4bit(torch.randn(32, 64))
        >>> x = torch.randn(5, 3, 64, requires_grad=True)
        >>> y = lk.linear_4bit(x, w, bias=torch.zeros(32))
        >>> y.shape, torch.allclose(y, x @ w.dequantize().T, atol=1e-4)
        (torch.Size([5, 3, 32]), True)
        >>> y.sum().backward()
    """
    check_weight(w)
    if is_ragged(x):
        return by_rows(lambda rows: linear_4bit(rows, w, bias), x)
    check_tensor("x", x)
    x = autocast(x)
    N, K = w.shape
    check_linear(x, N, K, w.device, bias)
    return linear(x, w, bias)


def linear(x: torch.Tensor, w: Weight4bit, bias: torch.Tensor | None) -> torch.Tensor:
    """:func:`linear_4bit` of arguments that were checked: x by :func:`taken`, a layer's own when they were set."""
    N, K = w.shape
    rows = x.reshape(math.prod(x.shape[:-1]), K)
    if wants_grad(x, w, bias):
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

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> w = lk.quantize_4bit(torch.randn(32, 64))
        >>> A, B = torch.randn(4, 64, requires_grad=True), torch.zeros(32, 4, requires_grad=True)
        >>> y = lk.lora_linear_4bit(torch.randn(5, 64), w, A, B, scaling=2.0, dropout_p=0.1)
        >>> y.sum().backward()
        >>> A.grad.shape, B.grad.shape
        (torch.Size([4, 64]), torch.Size([32, 4]))
    """
    check_weight(w)
    if is_ragged(x):
        return by_rows(lambda rows: lora_linear_4bit(rows, w, A, B, scaling, bias, dropout_p), x)
    check_tensor("x", x)
    x = autocast(x)
    N, K = w.shape
    check_linear(x, N, K, w.device, bias)
    check_lora(x, N, K, A, B, scaling, dropout_p)
    return lora(x, w, A, B, float(scaling), bias, float(dropout_p))


def lora(x, w, A, B, scaling: float, bias, dropout_p: float) -> torch.Tensor:
    """:func:`lora_linear_4bit` of arguments that were checked, as :func:`linear`."""
    N, K = w.shape
    rows = x.reshape(math.prod(x.shape[:-1]), K)
    needs_grad = wants_grad(x, w, A, B, bias)
    seed = dropout_seed(dropout_p, x.device) if dropout_p else None
    if needs_grad:
        y = _LoRALinear4bit.apply(rows, A, B, bias, seed, scaling, dropout_p, *w.op_args())
    else:
        y, _ = ops.lora_linear_4bit(rows, *w.op_args(), A, B, scaling, bias, dropout_p, seed)
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

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> x, weight, A, B = torch.randn(5, 64), torch.randn(32, 64), torch.randn(4, 64), torch.randn(32, 4)
        >>> torch.allclose(lk.lora_linear(x, weight, A, B, 0.5), x @ weight.T + 0.5 * x @ A.T @ B.T, atol=1e-3)
        True
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
    if wants_grad(x, None, A, B, bias, weight):
        y = _LoRALinear.apply(rows, A, B, bias, weight, seed, float(scaling), float(dropout_p))
    else:
        y, _ = ops.lora_linear(rows, weight, A, B, float(scaling), bias, float(dropout_p), seed)
    return y.view(*x.shape[:-1], N)


def check_weight(w: object) -> None:
    if not isinstance(w, Weight4bit):
        raise TypeError(f"w: expected a Weight4bit (see quantize_4bit), got {type(w).__name__}")
