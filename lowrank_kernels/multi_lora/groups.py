"""The many-adapter form of groups.py: several weights that share x, each with the adapters of its own pages."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..formats import Weight4bit
from ..functional import differentiable_once, wants_grad
from ..groups import check_group, group, group_args, listed, refuse_int8
from ..schema import ops
from .functional import Gradients, Read, check_batch
from .pages import ModulePages
from .plan import Plan


class _MultiGroup(torch.autograd.Function):
    """``reads``: of each weight, see functional.py. ``tensors``: the biases, one per weight or none, then parameters
    of the adapters of each weight that live in its pages."""

    @staticmethod
    def forward(ctx, x, weights, dims, reads, seed, bias_count, *tensors):
        bias = list(tensors[:bias_count])
        pages = [t for read in reads for t in read[1].args]
        ys, ss = ops.multi_lora_linear_4bit_group(
            x, weights, dims, *reads[0][0].args, pages, seed, bias
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *weights, *seed, *ss, *tensors)
        ctx.rest = dims, reads, len(seed), bias_count
        return tuple(ys)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, *dys):
        some = next((dy for dy in dys if dy is not None), None)
        if some is None:
            return (None,) * len(ctx.needs_input_grad)
        dims, reads, seeds, bias_count = ctx.rest
        count, at = len(dys), 1 + 6 * len(dys)
        x, weights, seed = saved[0], list(saved[1:at]), list(saved[at : at + seeds])
        ss, tensors = list(saved[at + seeds :][:count]), saved[at + seeds + count :]
        bias, parameters = list(tensors[:bias_count]), tensors[bias_count:]
        need_bias = ctx.needs_input_grad[6 : 6 + bias_count]
        needed = ctx.needs_input_grad[6 + bias_count :]
        gradients, first = [], 0
        for read in reads:
            last = first + 2 * len(read[2])
            gradients.append((Gradients(read, needed[first:last]), parameters[first:last]))
            first = last
        nothing = some.new_empty(0)
        pages = [t for read in reads for t in read[1].args]
        dx, dA, dB, dbias = ops.multi_lora_linear_4bit_group_backward(
            [nothing if dy is None else dy for dy in dys], x, ss, weights, dims,
            *reads[0][0].args, pages, seed, bias,
            [of.args[0] for of, _ in gradients], [of.args[1] for of, _ in gradients],
            ctx.needs_input_grad[0], need_bias or [False] * count,
        )  # fmt: skip
        of_parameters = [
            gradient
            for i, (of, own) in enumerate(gradients)
            for gradient in (
                [None] * len(own) if dys[i] is None else of.of_parameters(dA[i], dB[i], own)
            )
        ]
        return (
            dx if ctx.needs_input_grad[0] else None,
            *([None] * 5),
            *(
                gradient if need and dy is not None else None
                for gradient, need, dy in zip(dbias, need_bias, dys)
            ),
            *of_parameters,
        )


def multi_group(
    x: torch.Tensor,
    ws: Sequence[Weight4bit],
    plan: Plan,
    pages: Sequence[ModulePages],
    biases: Sequence[torch.Tensor | None],
    dropout: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """:func:`multi_lora_linear_4bit_group` of arguments that were checked, all but the rows of x."""
    leading, K = x.shape[:-1], x.shape[-1]
    rows = x.reshape(math.prod(leading), K)
    if rows.shape[0] != plan.args.tile_of_row.shape[0]:
        plan = plan.for_shape(x.shape)
    if plan.is_base_only:
        return group(x, ws, biases, [None] * len(ws))
    nothing = x.new_empty(0)
    weights, dims = group_args(ws, nothing)
    bias = listed(biases, nothing)
    seed = listed([of.seed(plan) if acts else None for of, acts in zip(pages, dropout)], nothing)
    owned = [of.parameters(plan) for of in pages]
    parameters = [parameter for _, own in owned for parameter in own]
    needs_grad = wants_grad(x, None, *bias, *parameters)
    refuse_int8(x, ws, needs_grad)
    if needs_grad:
        reads: list[Read] = [
            (plan, of, slots, plan.version, tuple(map(of.moves.get, slots)))
            for of, (slots, _) in zip(pages, owned)
        ]
        ys = _MultiGroup.apply(rows, weights, dims, reads, seed, len(bias), *bias, *parameters)
    else:
        tables = [t for of in pages for t in of.args]
        ys, _ = ops.multi_lora_linear_4bit_group(
            rows, weights, dims, *plan.args, tables, seed, bias
        )
    return tuple([y.view(*leading, y.shape[-1]) for y in ys])


def multi_lora_linear_4bit_group(
    x: torch.Tensor,
    weights: Sequence[Weight4bit],
    plan: Plan,
    pages: Sequence[ModulePages],
    biases: Sequence[torch.Tensor | None] | None = None,
    dropout: bool = False,
) -> tuple[torch.Tensor, ...]:
    """``y_i = x W_iᵀ + bias_i + Δ_i``: several weights that share x and a plan, in one operator call each way.

    Args:
        x, weights, biases: as :func:`linear_4bit_group`; plan, dropout: as :func:`multi_lora_linear_4bit`.
        pages: those of each weight's module, ``bank[module_name]``.

    Returns:
        ``[..., N_i]`` in x's dtype for each weight, with the bits of :func:`multi_lora_linear_4bit`. Differentiable
        as that is; dx is a float32 sum over the weights that is rounded once.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`linear_4bit_group` and :func:`multi_lora_linear_4bit`.

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> from lowrank_kernels.multi_lora.groups import multi_lora_linear_4bit_group
        >>> model = torch.nn.ModuleDict({"q": torch.nn.Linear(64, 32), "k": torch.nn.Linear(64, 16)})
        >>> report = lk.replace_linear(model, r=4, progress=False)
        >>> bank = lk.AdapterBank.for_model(model, num_pages=8)
        >>> bank.load("default")
        >>> plan, weights = bank.plan(["default", None]), [layer.weight4bit for layer in model.values()]
        >>> ys = multi_lora_linear_4bit_group(torch.ones(2, 64), weights, plan, [bank["q"], bank["k"]])
        >>> [tuple(y.shape) for y in ys]
        [(2, 32), (2, 16)]
    """
    x, biases = check_group(x, weights, biases)
    if not isinstance(pages, list | tuple):
        raise TypeError(f"pages: expected a list of pages, got {type(pages).__name__}")
    if len(pages) != len(weights):
        raise ValueError(
            f"pages: expected {len(weights)} entries, one for each weight, got {len(pages)}"
        )
    for w, of in zip(weights, pages):
        check_batch(x, plan, of, *w.shape)
    return multi_group(x, weights, plan, pages, biases, [dropout] * len(weights))
