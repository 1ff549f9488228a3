"""The differentiable functions of a batch with many adapters: checks, and one operator call each way."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .. import int8
from ..backends import check_batch_invariant
from ..formats import Weight4bit
from ..functional import autocast, check_weight, dropout_seed, linear_4bit, wants_grad
from ..schema import check_device, check_float, check_linear, check_shape, check_tensor, ops
from .pages import ModulePages
from .plan import Plan


class _Gradients:
    """Where the operators leave the gradients of the adapters that want some.

    ``slots``: of the adapters whose A and B are the last inputs of the function, in pairs; ``needed``: for each
    of those inputs.
    """

    def __init__(self, plan: Plan, pages: ModulePages, slots: list[int], needed: tuple[bool, ...]):
        plan.check_current()  # the pages still hold what the forward read
        pairs = zip(slots, needed[::2], needed[1::2], strict=True)
        self.pairs = [(slot, need_A, need_B) for slot, need_A, need_B in pairs]
        wanted = tuple(slot for slot, *needs in self.pairs if any(needs))
        self.first, self.rank = pages.grad_layout(wanted)
        self.args = pages.grad_rows(wanted), self.rank
        self.pages = pages

    def of_parameters(self, dA, dB, parameters) -> list[torch.Tensor | None]:
        gradients: list[torch.Tensor | None] = []
        for (slot, need_A, need_B), A, B in zip(self.pairs, parameters[::2], parameters[1::2]):
            first = self.first.get(slot, 0)
            rows = slice(first, first + self.pages.rank(slot))
            gradients.append(dA[rows].to(A.dtype) if need_A else None)
            gradients.append(dB[rows].T.to(B.dtype) if need_B else None)
        return gradients


class _MultiLoRALinear4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, seed, plan, pages, weight, slots, *parameters):
        batch = (*plan.op_args(), *pages.op_args(), seed)
        y, s = ops.multi_lora_linear_4bit(x, *weight, *batch, bias)
        ctx.save_for_backward(x, bias, seed, s, *weight[:6], *parameters)
        ctx.rest = plan, pages, weight[6:], slots
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, bias, seed, s, *saved = ctx.saved_tensors
        plan, pages, dims, slots = ctx.rest
        weight, parameters = (*saved[:6], *dims), saved[6:]
        need_dx, need_dbias = ctx.needs_input_grad[:2]
        gradients = _Gradients(plan, pages, slots, ctx.needs_input_grad[7:])
        batch = (*plan.op_args(), *pages.op_args(), seed)
        dx, dA, dB, dbias = ops.multi_lora_linear_4bit_backward(
            dy, x, s, *weight, *batch, bias, *gradients.args, need_dx, need_dbias
        )
        return (
            dx if need_dx else None,
            dbias if need_dbias else None,
            *([None] * 5),
            *gradients.of_parameters(dA, dB, parameters),
        )


class _MultiLoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, seed, plan, pages, slots, *parameters):
        s = ops.multi_lora_(y, x, *plan.op_args(), *pages.op_args(), seed)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, seed, s, *parameters)
        ctx.rest = plan, pages, slots
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, seed, s, *parameters = ctx.saved_tensors
        plan, pages, slots = ctx.rest
        need_dx = ctx.needs_input_grad[1]
        gradients = _Gradients(plan, pages, slots, ctx.needs_input_grad[6:])
        batch = (*plan.op_args(), *pages.op_args(), seed)
        dx, dA, dB = ops.multi_lora_backward(dy, x, s, *batch, *gradients.args, need_dx)
        return (
            dy if ctx.needs_input_grad[0] else None,
            dx if need_dx else None,
            *([None] * 4),
            *gradients.of_parameters(dA, dB, parameters),
        )


def multi_lora_linear_4bit(
    x: torch.Tensor,
    w: Weight4bit,
    plan: Plan,
    pages: ModulePages,
    bias: torch.Tensor | None = None,
    dropout: bool = False,
) -> torch.Tensor:
    """``y = x Wᵀ + bias + Δ``: a 4-bit base and the adapter of each row, in one operator each way.

    For a row m whose adapter is u, ``Δ[m] = scaling_u · S[m] B_uᵀ`` with ``S[m] = dropout_u(x)[m] A_uᵀ``;
    zero for a row without adapter. This is what :class:`LoRALinear4bit` calls under a plan.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16, with as many rows as :meth:`Plan.for_rows` takes.
        w: frozen 4-bit weight ``[N, K]``.
        plan, pages: of one :class:`AdapterBank`: ``bank.plan(...)``, ``bank[module_name]``.
        bias: ``[N]`` or None.
        dropout: whether each adapter's own dropout acts; False in inference.

    Returns:
        ``[..., N]`` in x's dtype, accumulated in float32, rounded once. Differentiable in x, bias and those
        parameters of the model's own adapters in the bank that require a gradient.

    Raises:
        TypeError, ValueError: as :func:`linear_4bit`; for another number of rows than the plan's, and for
            pages of another bank or module.
        RuntimeError: an adapter of the plan has been evicted.
    """
    check_weight(w)
    check_tensor("x", x)
    x = autocast(x)
    N, K = w.shape
    check_linear(x, N, K, w.device, bias)
    plan = _check_batch(x, plan, pages, N, K)
    if plan.is_base_only:
        return linear_4bit(x, w, bias)
    rows = x.reshape(x.shape[:-1].numel(), K)
    seed = dropout_seed(pages.dropout(plan) if dropout else 0.0, x.device)
    slots, parameters = pages.parameters(plan)
    needs_grad = wants_grad(x, bias, *parameters)
    int8.check(x, w, needs_grad)
    check_batch_invariant(x)
    if needs_grad:
        y = _MultiLoRALinear4bit.apply(
            rows, bias, seed, plan, pages, w.op_args(), slots, *parameters
        )
    else:
        batch = (*plan.op_args(), *pages.op_args(), seed)
        y, _ = ops.multi_lora_linear_4bit(rows, *w.op_args(), *batch, bias)
    return y.view(*x.shape[:-1], N)


def multi_lora_(
    y: torch.Tensor, x: torch.Tensor, plan: Plan, pages: ModulePages, dropout: bool = False
) -> torch.Tensor:
    """``y += Δ`` in place: to each row what its adapter adds, ``Δ[m] = scaling_u · dropout_u(x)[m] A_uᵀ B_uᵀ``.

    Rows without adapter stay as they are. BGMV and SGMV of Punica are this function for one row and for many
    rows per adapter.

    Args:
        y: ``[..., N]``, x's dtype, without gaps between its leading dimensions.
        x: ``[..., K]`` float32, bfloat16 or float16, with as many rows as :meth:`Plan.for_rows` takes.
        plan, pages: of one :class:`AdapterBank`: ``bank.plan(...)``, ``bank[module_name]``.
        dropout: whether each adapter's own dropout acts.

    Returns:
        y. The sum is float32, rounded once into y. Differentiable in y, x and those parameters of the model's
        own adapters in the bank that require a gradient.

    Raises:
        TypeError, ValueError: a tensor is not of those shapes and dtypes; the plan has another number of rows;
            plan and pages are of different banks.
        RuntimeError: an adapter of the plan has been evicted.

    Sources: Punica (Chen et al. 2023), S-LoRA (Sheng et al. 2023).
    """
    check_float("x", x)
    check_float("y", y)
    _check_pages(pages)
    N, K = pages.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x: expected shape [..., K] with K = {K}, got {tuple(x.shape)}")
    check_shape("y", y, (*x.shape[:-1], N), "[..., N]")
    check_device("y", y, x.device)
    if y.dtype != x.dtype:
        raise TypeError(f"y: expected {x.dtype} like x, got {y.dtype}")
    plan = _check_batch(x, plan, pages, N, K)
    if plan.is_base_only:
        return y
    rows = x.shape[:-1].numel()
    try:
        y_rows = y.view(rows, N)
    except RuntimeError:
        raise ValueError(
            f"y: expected rows that can be seen as one matrix, got strides {y.stride()} for shape "
            f"{tuple(y.shape)}"
        ) from None
    x_rows = x.reshape(rows, K)
    seed = dropout_seed(pages.dropout(plan) if dropout else 0.0, x.device)
    slots, parameters = pages.parameters(plan)
    if wants_grad(y, x, *parameters):
        _MultiLoRA.apply(y_rows, x_rows, seed, plan, pages, slots, *parameters)
    else:
        ops.multi_lora_(y_rows, x_rows, *plan.op_args(), *pages.op_args(), seed)
    return y


def _check_pages(pages: object) -> None:
    if not isinstance(pages, ModulePages):
        raise TypeError(
            f"pages: expected bank[module_name] of an AdapterBank, got {type(pages).__name__}"
        )


def _check_batch(x: torch.Tensor, plan: Plan, pages: ModulePages, N: int, K: int) -> Plan:
    """The plan for as many rows as x has."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan of AdapterBank.plan, got {type(plan).__name__}")
    _check_pages(pages)
    if pages.bank is not plan.bank:
        raise ValueError(
            "pages: expected those of the plan's bank, got those of another AdapterBank"
        )
    if pages.shape != (N, K):
        raise ValueError(
            f"pages: expected those of a module [N, K] = {(N, K)}, got those of "
            f"{pages.name!r}, {pages.shape}"
        )
    if pages.device != x.device:
        raise ValueError(f"pages: expected some on {x.device} like x, got some on {pages.device}")
    plan.check_current()
    return plan.for_rows(x.shape[:-1].numel())
