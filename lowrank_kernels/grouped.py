"""The differentiable functions of stacked experts, of which each row of x meets one. See functional.py."""

from __future__ import annotations

import torch

from .formats import Weight4bit
from .functional import autocast, check_weight, differentiable_once, wants_grad
from .schema import check_device, check_float, check_shape, check_tensor, ops


class _GroupedLinear4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, offsets, transposed, *weight):
        ctx.save_for_backward(offsets, *weight[:6])
        ctx.scalars = transposed, weight[6:], None if bias is None else bias.dtype
        return ops.grouped_linear_4bit(x, *weight, offsets, transposed, bias)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dy):
        offsets, *weight = saved
        transposed, dims, bias_dtype = ctx.scalars
        need_dx, need_dbias = ctx.needs_input_grad[:2]
        # dx = dy W is the forward of the transposed stack.
        dx = (
            ops.grouped_linear_4bit(dy, *weight, *dims, offsets, not transposed, None)
            if need_dx
            else None
        )
        dbias = _bias_gradient(dy, offsets, bias_dtype) if need_dbias else None
        return dx, dbias, *([None] * 11)


class _GroupedLoRALinear4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, B, bias, offsets, transposed, scaling, *weight):
        y, s = ops.grouped_lora_linear_4bit(x, *weight, offsets, transposed, A, B, scaling, bias)
        ctx.save_for_backward(x, A, B, s, offsets, *weight[:6])
        ctx.scalars = transposed, scaling, weight[6:], None if bias is None else bias.dtype
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dy):
        x, A, B, s, offsets, *weight = saved
        transposed, scaling, dims, bias_dtype = ctx.scalars
        *needs, need_dbias = ctx.needs_input_grad[:4]
        gradients = ops.grouped_lora_linear_4bit_backward(
            dy, x, s, *weight, *dims, offsets, transposed, A, B, scaling, *needs
        )
        dbias = _bias_gradient(dy, offsets, bias_dtype) if need_dbias else None
        gradients = (g if need else None for g, need in zip(gradients, needs, strict=True))
        return *gradients, dbias, *([None] * 12)


def _bias_gradient(dy: torch.Tensor, offsets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dbias_e = Σ dy over the rows of e. A product, since index_add has no fixed order on GPUs."""
    rows = torch.arange(dy.shape[0], device=dy.device)
    expert = torch.searchsorted(offsets.long(), rows, right=True)
    experts = torch.arange(offsets.shape[0], device=dy.device)
    return ((expert == experts[:, None]).float() @ dy.float()).to(dtype)


def grouped_linear_4bit(
    x: torch.Tensor,
    w: Weight4bit,
    offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """``y[m] = W_e x[m] + bias_e`` for the rows m of each expert e; reads only experts that have rows.

    Args:
        x: ``[M, K]`` float32, bfloat16 or float16, sorted by expert.
        w: the stack ``[E, N, K]`` (``[E, K, N]`` if ``transposed``), see :func:`quantize_4bit`. Frozen: no gradient.
        offsets: int32 ``[E]``, ascending: rows ``offsets[e-1]`` to ``offsets[e]`` belong to expert e, from 0 on for
            e = 0, as in torch's ``grouped_mm``. An expert may have none. Rows from ``offsets[E-1]`` on belong to no
            expert (another process has theirs): y is zero there.
        bias: ``[E, N]`` floating, or None.
        transposed: whether each expert lies as ``[K, N]``, as GPT-OSS has them.

    Returns:
        ``[M, N]`` in x's dtype: accumulated in float32, rounded once. Differentiable in x and bias. Under
        torch.autocast x is cast first.

    Raises:
        TypeError: an argument is no tensor of those dtypes, or w no Weight4bit.
        ValueError: shapes or devices do not fit; the message names the argument.
        RuntimeError: offsets descend or exceed M (on a CPU, where they are looked at).

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> w = lk.quantize_4bit(torch.randn(4, 32, 64))
        >>> x, offsets = torch.randn(5, 64), torch.tensor([2, 2, 4, 5], dtype=torch.int32)
        >>> y = lk.grouped_linear_4bit(x, w, offsets)
        >>> y.shape, torch.allclose(y[2:4], x[2:4] @ w.dequantize()[2].T, atol=1e-4)
        (torch.Size([5, 32]), True)
    """
    x = _checked(x, w, offsets, bias, transposed)
    if wants_grad(x, w, bias):
        return _GroupedLinear4bit.apply(x, bias, offsets, transposed, *w.op_args())
    return ops.grouped_linear_4bit(x, *w.op_args(), offsets, transposed, bias)


def grouped_lora_linear_4bit(
    x: torch.Tensor,
    w: Weight4bit,
    offsets: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: float = 1.0,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """``y[m] = W_e x[m] + scaling · B_e A_e x[m] + bias_e``: each expert and its own adapter in one operator each way.

    Args:
        x, w, offsets, bias, transposed: see :func:`grouped_linear_4bit`.
        A: ``[E, R, K]``; B: ``[E, N, R]``, whether the stack is transposed or not; any floating dtype, any strides.
            Gradients come in theirs; those of an expert without rows are zero.
        scaling: PEFT's ``lora_alpha / r``.

    Returns:
        ``[M, N]`` in x's dtype, accumulated in float32. Differentiable in x, A, B and bias. S ``[M, R]`` is kept for
        backward in float32.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`grouped_linear_4bit`, and for A, B and scaling.

    Source: LoRA (Hu et al. 2021); PEFT's ``target_parameters``, which have no dropout either.

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> w = lk.quantize_4bit(torch.randn(4, 32, 64))
        >>> A, B = torch.randn(4, 8, 64, requires_grad=True), torch.zeros(4, 32, 8, requires_grad=True)
        >>> offsets = torch.tensor([2, 2, 4, 5], dtype=torch.int32)
        >>> lk.grouped_lora_linear_4bit(torch.randn(5, 64), w, offsets, A, B, scaling=2.0).sum().backward()
        >>> B.grad.shape, bool(B.grad[1].any())  # no row met expert 1
        (torch.Size([4, 32, 8]), False)
    """
    x = _checked(x, w, offsets, bias, transposed)
    N, K = _expert_shape(w, transposed)
    for name, tensor in {"A": A, "B": B}.items():
        check_float(name, tensor)
        check_device(name, tensor, x.device)
    experts = w.shape[0]
    if A.dim() != 3 or A.shape[0] != experts or A.shape[2] != K or A.shape[1] < 1:
        raise ValueError(
            f"A: expected shape [E, R, K] = [{experts}, R >= 1, {K}], got {tuple(A.shape)}"
        )
    check_shape("B", B, (experts, N, A.shape[1]), "[E, N, R]")
    if not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling: expected a number, got {type(scaling).__name__}")
    of = offsets, transposed
    if wants_grad(x, w, A, B, bias):
        return _GroupedLoRALinear4bit.apply(x, A, B, bias, *of, float(scaling), *w.op_args())
    return ops.grouped_lora_linear_4bit(x, *w.op_args(), *of, A, B, float(scaling), bias)[0]


def _expert_shape(w: Weight4bit, transposed: bool) -> tuple[int, int]:
    _, rows, columns = w.shape
    return (columns, rows) if transposed else (rows, columns)


def _checked(x, w, offsets, bias, transposed) -> torch.Tensor:
    """x in the dtype that torch.autocast asks for, after the checks of all that both functions take."""
    check_weight(w)
    if len(w.shape) != 3:
        raise ValueError(f"w: expected a stack [E, N, K], got shape {tuple(w.shape)}")
    if type(transposed) is not bool:
        raise TypeError(f"transposed: expected True or False, got {transposed!r}")
    check_tensor("x", x)
    x = autocast(x)
    check_float("x", x)
    N, K = _expert_shape(w, transposed)
    if x.dim() != 2 or x.shape[1] != K:
        raise ValueError(f"x: expected shape [M, K] with K = {K}, got {tuple(x.shape)}")
    check_tensor("offsets", offsets)
    if offsets.dtype != torch.int32:
        raise TypeError(f"offsets: expected int32, got {offsets.dtype}")
    check_shape("offsets", offsets, (w.shape[0],), "[E]")
    for name, device in {"w": w.device, "offsets": offsets.device}.items():
        if device != x.device:
            raise ValueError(f"{name}: expected one on {x.device} like x, got one on {device}")
    if bias is not None:
        check_float("bias", bias)
        check_shape("bias", bias, (w.shape[0], N), "[E, N]")
        check_device("bias", bias, x.device)
    return x
