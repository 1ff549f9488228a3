"""The differentiable functions of a batch with many adapters: checks, and one operator call each way."""

from __future__ import annotations

import math

import torch

from ..formats import Weight4bit
from ..functional import (
    autocast,
    check_weight,
    differentiable_once,
    linear,
    wants_grad,
)
from ..schema import check_device, check_float, check_linear, check_shape, check_tensor, ops
from .pages import ModulePages
from .plan import Plan

# What a forward read: a plan, pages, the slots of adapters that live in the pages; and how often, by then, the plan had
# been updated and parameters of each slot been moved in.
Read = tuple[Plan, ModulePages, list[int], int, tuple[int, ...]]


def check_unchanged(read: Read) -> None:
    """Raises RuntimeError unless plan and pages still hold what the forward read."""
    plan, pages, slots, version, moves = read
    if torch.compiler.is_compiling():
        return
    plan.check_current()
    if plan.version != version:
        raise RuntimeError(
            "plan: expected the backward before Plan.update, which has put another batch in its place"
        )
    if tuple(map(pages.moves.get, slots)) != moves:
        raise RuntimeError(
            "pages: expected the adapters of the forward, but since then other parameters took their place in the "
            "layer"
        )


class Gradients:
    """Where the operators leave the gradients of the adapters that want some.

    ``needed``: for each A and B of the adapters of ``read``, which are the last inputs of the function, in pairs.
    """

    def __init__(self, read: Read, needed: tuple[bool, ...]):
        check_unchanged(read)
        _, pages, slots, *_ = read
        pairs = zip(slots, needed[::2], needed[1::2], strict=True)
        self.pairs = [(slot, need_A, need_B) for slot, need_A, need_B in pairs]
        wanted = tuple(slot for slot, *needs in self.pairs if any(needs))
        self.first, self.rank = pages.grad_layout(wanted)
        self.args = pages.grad_rows(wanted), self.rank
        self.pages = pages

    def of_parameters(self, dA, dB, parameters) -> list[torch.Tensor | None]:
        gradients: list[torch.Tensor | None] = []
        for (slot, need_A, need_B), A, B in zip(self.pairs, parameters[::2], parameters[1::2]):
            if slot not in self.first:
                gradients += None, None
                continue
            of_A, of_B = self.pages.gradients(slot, self.first[slot], dA, dB)
            gradients.append(of_A.to(A.dtype) if need_A else None)
            gradients.append(of_B.to(B.dtype) if need_B else None)
        return gradients


class _MultiLoRALinear4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, seed, read, weight, *parameters):
        y, s = ops.multi_lora_linear_4bit(x, *weight, *read[0].args, *read[1].args, seed, bias)
        # The parameters for their version: a step of an optimizer before the backward is an error.
        ctx.save_for_backward(x, bias, seed, s, *weight[:6], *parameters)
        ctx.rest = read, weight[6:]
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dy):
        x, bias, seed, s, *saved = saved
        read, dims = ctx.rest
        weight, parameters = (*saved[:6], *dims), saved[6:]
        need_dx, need_dbias = ctx.needs_input_grad[:2]
        gradients = Gradients(read, ctx.needs_input_grad[5:])
        dx, dA, dB, dbias = ops.multi_lora_linear_4bit_backward(
            dy,
            x,
            s,
            *weight,
            *read[0].args,
            *read[1].args,
            seed,
            bias,
            *gradients.args,
            need_dx,
            need_dbias,
        )
        return (
            dx if need_dx else None,
            dbias if need_dbias else None,
            *([None] * 3),
            *gradients.of_parameters(dA, dB, parameters),
        )


class _MultiLoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, seed, read, *parameters):
        s = ops.multi_lora_(y, x, *read[0].args, *read[1].args, seed)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, seed, s, *parameters)
        ctx.rest = read
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dy):
        x, seed, s, *parameters = saved
        read = ctx.rest
        need_dx = ctx.needs_input_grad[1]
        gradients = Gradients(read, ctx.needs_input_grad[4:])
        dx, dA, dB = ops.multi_lora_backward(
            dy, x, s, *read[0].args, *read[1].args, seed, *gradients.args, need_dx
        )
        return (
            dy if ctx.needs_input_grad[0] else None,
            dx if need_dx else None,
            *([None] * 2),
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
        x: ``[..., K]`` float32, bfloat16 or float16, of a shape that :meth:`Plan.for_shape` takes.
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
    check_batch(x, plan, pages, N, K)
    return multi(x, w, plan, pages, bias, dropout)


def multi(
    x: torch.Tensor,
    w: Weight4bit,
    plan: Plan,
    pages: ModulePages,
    bias: torch.Tensor | None,
    dropout: bool,
) -> torch.Tensor:
    """:func:`multi_lora_linear_4bit` of arguments that were checked, all but the rows of x; the plan is current."""
    N, K = w.shape
    rows = x.reshape(math.prod(x.shape[:-1]), K)
    if rows.shape[0] != plan.args.tile_of_row.shape[0]:
        plan = plan.for_shape(x.shape)
    if plan.is_base_only:
        return linear(x, w, bias)
    seed = pages.seed(plan) if dropout else None
    slots, parameters = pages.parameters(plan)
    if wants_grad(x, w, bias, *parameters):
        read = plan, pages, slots, plan.version, tuple(map(pages.moves.get, slots))
        y = _MultiLoRALinear4bit.apply(rows, bias, seed, read, w.op_args(), *parameters)
    else:
        y, _ = ops.multi_lora_linear_4bit(rows, *w.op_args(), *plan.args, *pages.args, seed, bias)
    return y.view(*x.shape[:-1], N)


def multi_lora_(
    y: torch.Tensor, x: torch.Tensor, plan: Plan, pages: ModulePages, dropout: bool = False
) -> torch.Tensor:
    """``y += Δ`` in place: to each row what its adapter adds, ``Δ[m] = scaling_u · dropout_u(x)[m] A_uᵀ B_uᵀ``.

    Rows without adapter stay as they are. BGMV and SGMV of Punica are this function for one row and for many
    rows per adapter.

    Args:
        y: ``[..., N]``, x's dtype, without gaps between its leading dimensions.
        x: ``[..., K]`` float32, bfloat16 or float16, of a shape that :meth:`Plan.for_shape` takes.
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

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> report = lk.replace_linear(model, r=4, progress=False)
        >>> bank = lk.AdapterBank.for_model(model, num_pages=8)
        >>> bank.load("a", {"0.lora_A.weight": torch.ones(1, 64), "0.lora_B.weight": torch.ones(32, 1)})
        >>> y = lk.multi_lora_(torch.zeros(2, 32), torch.ones(2, 64), bank.plan(["a", None]), bank["0"])
        >>> y[:, 0]
        tensor([64.,  0.])
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
    check_batch(x, plan, pages, N, K)
    plan = plan.for_shape(x.shape)
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
    seed = pages.seed(plan) if dropout else None
    slots, parameters = pages.parameters(plan)
    if wants_grad(x, None, y, *parameters):
        read = plan, pages, slots, plan.version, tuple(map(pages.moves.get, slots))
        _MultiLoRA.apply(y_rows, x_rows, seed, read, *parameters)
    else:
        ops.multi_lora_(y_rows, x_rows, *plan.args, *pages.args, seed)
    return y


def _check_pages(pages: object) -> None:
    if not isinstance(pages, ModulePages):
        raise TypeError(
            f"pages: expected bank[module_name] of an AdapterBank, got {type(pages).__name__}"
        )


def check_batch(x: torch.Tensor, plan: Plan, pages: ModulePages, N: int, K: int) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan of AdapterBank.plan, got {type(plan).__name__}")
    _check_pages(pages)
    if pages.table is not plan.bank:
        raise ValueError(
            "pages: expected those of the plan's bank, got those of another AdapterBank"
        )
    if pages.shape != (N, K):
        raise ValueError(
            f"pages: expected those of a module [N, K] = {(N, K)}, got those of one {pages.shape}"
        )
    if pages.device != x.device:
        raise ValueError(f"pages: expected some on {x.device} like x, got some on {pages.device}")
    plan.check_current()
