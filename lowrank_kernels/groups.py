"""The differentiable functions of several weights that share x: checks, and one operator call each way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from . import int8
from .formats import Weight4bit
from .functional import autocast, differentiable_once, dropout_seed, wants_grad
from .ragged import is_ragged, layout_error
from .schema import check_linear, check_lora, check_tensor, ops


class Lora(NamedTuple):
    """The adapter of one weight of a group."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    dropout_p: float


def group_args(
    ws: Sequence[Weight4bit], nothing: torch.Tensor
) -> tuple[list[torch.Tensor], list[int]]:
    """The arguments ``weights`` and ``dims`` of the operators; ``nothing`` stands for None."""
    weights, dims = [], []
    for w in ws:
        weights += w.packed, w.absmax, w.code
        if w.nested_absmax is None:
            weights += nothing, nothing, nothing
        else:
            weights += w.nested_absmax, w.nested_code, w.nested_offset
        dims += *w.shape, w.blocksize
    return weights, dims


def listed(values: Sequence[torch.Tensor | None], nothing: torch.Tensor) -> list[torch.Tensor]:
    """``values`` as a list of the operators: empty where all are None."""
    if not any(value is not None for value in values):
        return []
    return [nothing if value is None else value for value in values]


def refuse_int8(x: torch.Tensor, ws: Sequence[Weight4bit], needs_grad: bool) -> None:
    if getattr(int8.state, "active", False):
        for w in ws:
            int8.check(x, w, needs_grad)


class _Group(torch.autograd.Function):
    """``tensors``: the biases, the As and the Bs, each one per weight or none at all."""

    @staticmethod
    def forward(ctx, x, weights, dims, scaling, dropout_p, seed, bias_count, *tensors):
        lora_count = (len(tensors) - bias_count) // 2
        bias, A, B = _parts(_filled(tensors, x), bias_count, lora_count)
        ys, ss = ops.lora_linear_4bit_group(x, weights, dims, A, B, scaling, bias, dropout_p, seed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if lora_count else None, *weights, *seed, *ss, *tensors)
        ctx.rest = dims, scaling, dropout_p, len(seed), bias_count, lora_count
        return tuple(ys)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, *dys):
        some = next((dy for dy in dys if dy is not None), None)
        if some is None:
            return (None,) * len(ctx.needs_input_grad)
        dims, scaling, dropout_p, seeds, bias_count, lora_count = ctx.rest
        x, *saved = saved
        count = len(dys)
        weights, seed, ss, *tensors = _cut(saved, 6 * count, seeds, count)
        bias, A, B = _parts(_filled(tensors, some), bias_count, lora_count)
        nothing = some.new_empty(0)
        need_bias, need_A, need_B = _parts(ctx.needs_input_grad[7:], bias_count, lora_count)
        none = [False] * count
        dx, dA, dB, dbias = ops.lora_linear_4bit_group_backward(
            [nothing if dy is None else dy for dy in dys], x, ss, weights, dims, A, B, scaling, bias,
            dropout_p, seed, ctx.needs_input_grad[0],
            need_A or none, need_B or none, need_bias or none,
        )  # fmt: skip

        def needed(gradients, needs):
            return [
                gradient if need and dy is not None else None
                for gradient, need, dy in zip(gradients, needs, dys)
            ]

        return (
            dx if ctx.needs_input_grad[0] else None,
            *([None] * 6),
            *needed(dbias, need_bias),
            *needed(dA, need_A),
            *needed(dB, need_B),
        )


def _filled(tensors: Sequence[torch.Tensor | None], like: torch.Tensor) -> list[torch.Tensor]:
    """``tensors`` as a list of the operators. torch.compile traces no Function that gets a tensor twice, but None."""
    return [like.new_empty(0) if t is None else t for t in tensors]


def _parts(values: Sequence, bias_count: int, lora_count: int) -> tuple[list, list, list]:
    middle = bias_count + lora_count
    return list(values[:bias_count]), list(values[bias_count:middle]), list(values[middle:])


def _cut(values: list, *lengths: int) -> Iterator:
    """Parts of these lengths, one after another, then what is left, item by item."""
    at = 0
    for length in lengths:
        yield values[at : at + length]
        at += length
    yield from values[at:]


def group(
    x: torch.Tensor,
    ws: Sequence[Weight4bit],
    biases: Sequence[torch.Tensor | None],
    loras: Sequence[Lora | None],
) -> tuple[torch.Tensor, ...]:
    """:func:`lora_linear_4bit_group` of arguments that were checked, each with an adapter or None."""
    leading, K = x.shape[:-1], x.shape[-1]
    rows, nothing = x.reshape(math.prod(leading), K), x.new_empty(0)
    weights, dims = group_args(ws, nothing)
    bias = listed(biases, nothing)
    A, B, scaling, dropout_p, seed = [], [], [], [], []
    if any(lora is not None for lora in loras):
        no_adapter = Lora(nothing, nothing, 1.0, 0.0)
        A, B, scaling, dropout_p = map(list, zip(*(lora or no_adapter for lora in loras)))
    needs_grad = wants_grad(x, None, *bias, *A, *B)
    refuse_int8(x, ws, needs_grad)
    if any(dropout_p):
        seed = listed([dropout_seed(p, x.device) for p in dropout_p], nothing)
    if needs_grad:
        tensors = (None if t is nothing else t for t in (*bias, *A, *B))
        ys = _Group.apply(rows, weights, dims, scaling, dropout_p, seed, len(bias), *tensors)
    else:
        ys, _ = ops.lora_linear_4bit_group(
            rows, weights, dims, A, B, scaling, bias, dropout_p, seed
        )
    return tuple([y.view(*leading, y.shape[-1]) for y in ys])


# -- public --------------------------------------------------------------------------------------------------

_LISTS = {"weight": "weights", "bias": "biases", "A": "As", "B": "Bs", "scaling": "scalings"}


@contextmanager
def _of_weight(i: int) -> Iterator[None]:
    """Errors within name the list and the place: ``biases[1]`` for ``bias``."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name, _, rest = str(error).partition(":")
        name = f"{_LISTS[name]}[{i}]" if name in _LISTS else name
        raise type(error)(f"{name}:{rest}") from None


def per_weight(name: str, values: object, count: int) -> list:
    """``values`` as a list with one entry for each of ``count`` weights; all None where it is None."""
    if values is None:
        return [None] * count
    if isinstance(values, torch.Tensor | str) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected a list, got {type(values).__name__}")
    if len(values) != count:
        raise ValueError(
            f"{name}: expected {count} entries, one for each weight, got {len(values)}"
        )
    return list(values)


def check_group(x: torch.Tensor, weights: object, biases: object) -> tuple[torch.Tensor, list]:
    """x in the dtype that torch.autocast asks for, and the biases; raises for what cannot be a group."""
    if not isinstance(weights, list | tuple):
        raise TypeError(f"weights: expected a list of Weight4bit, got {type(weights).__name__}")
    if not weights:
        raise ValueError("weights: expected one weight or more, got an empty list")
    for i, w in enumerate(weights):
        if not isinstance(w, Weight4bit):
            raise TypeError(
                f"weights[{i}]: expected a Weight4bit (see quantize_4bit), got {type(w).__name__}"
            )
        if w.shape[1] != weights[0].shape[1]:
            raise ValueError(
                f"weights[{i}]: expected shape [N, K] with K = {weights[0].shape[1]} like weights[0], "
                f"got {tuple(w.shape)}"
            )
    check_tensor("x", x)
    if is_ragged(x) or x.layout is not torch.strided:
        raise layout_error(x)
    x = autocast(x)
    biases = per_weight("biases", biases, len(weights))
    for i, (w, bias) in enumerate(zip(weights, biases)):
        with _of_weight(i):
            check_linear(x, *w.shape, w.device, bias)
    return x, biases


def linear_4bit_group(
    x: torch.Tensor,
    weights: Sequence[Weight4bit],
    biases: Sequence[torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, ...]:
    """``y_i = x W_iᵀ + bias_i`` of several weights that share x, in one operator call each way.

    For the projections of a layer that read the same activations (queries, keys and values; gate and up).

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16; any leading shape, empty too. No nested tensor.
        weights: one or more, ``[N_i, K]``, on x's device, each with its own code, blocks and scales. Frozen.
        biases: ``[N_i]`` floating or None for each weight; or None.

    Returns:
        ``[..., N_i]`` in x's dtype for each weight, with the bits of :func:`linear_4bit`. Differentiable in x and
        biases: ``dx = Σ_i dy_i W_i`` is a float32 sum that is rounded once, where separate calls round each term.
        (On a GPU what the products round is as for one weight.)

    Raises:
        TypeError, ValueError: as :func:`linear_4bit`, for an empty list, lists of unequal length and weights of
            different K; the message names the argument and the place in its list.

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> q, k = lk.quantize_4bit(torch.randn(32, 64)), lk.quantize_4bit(torch.randn(16, 64))
        >>> x = torch.randn(5, 3, 64, requires_grad=True)
        >>> y_q, y_k = lk.linear_4bit_group(x, [q, k])
        >>> y_k.shape, torch.equal(y_q, lk.linear_4bit(x, q))
        (torch.Size([5, 3, 16]), True)
        >>> (y_q.sum() + y_k.sum()).backward()
    """
    x, biases = check_group(x, weights, biases)
    return group(x, weights, biases, [None] * len(weights))


def lora_linear_4bit_group(
    x: torch.Tensor,
    weights: Sequence[Weight4bit],
    As: Sequence[torch.Tensor | None],
    Bs: Sequence[torch.Tensor | None],
    scalings: Sequence[float],
    biases: Sequence[torch.Tensor | None] | None = None,
    dropout_p: float | Sequence[float] = 0.0,
) -> tuple[torch.Tensor, ...]:
    """``y_i = x W_iᵀ + scaling_i · S_i B_iᵀ + bias_i`` with ``S_i = dropout_i(x) A_iᵀ``, in one operator call each way.

    Args:
        x, weights, biases: as :func:`linear_4bit_group`.
        As, Bs: ``[R_i, K]`` and ``[N_i, R_i]`` of each weight, floating; both None for a weight without an adapter.
        scalings: of each weight.
        dropout_p: of all weights, or a list with one for each. Every adapter has a mask of its own: seeds are drawn
            from torch's generator in the order of the weights, as separate calls draw them.

    Returns:
        ``[..., N_i]`` in x's dtype for each weight, with the bits of :func:`lora_linear_4bit`. Differentiable in x,
        As, Bs and biases: ``dx = Σ_i (dy_i W_i + mask_i (dS_i A_i))``, a float32 sum that is rounded once.

    Raises:
        TypeError, ValueError: as :func:`linear_4bit_group` and :func:`lora_linear_4bit`.

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> q, k = lk.quantize_4bit(torch.randn(32, 64)), lk.quantize_4bit(torch.randn(16, 64))
        >>> A, B = torch.randn(4, 64, requires_grad=True), torch.zeros(32, 4, requires_grad=True)
        >>> y_q, y_k = lk.lora_linear_4bit_group(torch.randn(5, 64), [q, k], [A, None], [B, None], [2.0, 1.0])
        >>> (y_q.sum() + y_k.sum()).backward()
        >>> A.grad.shape, B.grad.shape
        (torch.Size([4, 64]), torch.Size([32, 4]))
    """
    x, biases = check_group(x, weights, biases)
    count = len(weights)
    As, Bs = per_weight("As", As, count), per_weight("Bs", Bs, count)
    scalings = per_weight("scalings", scalings, count)
    if isinstance(dropout_p, Sequence) and not isinstance(dropout_p, str):
        rates = per_weight("dropout_p", dropout_p, count)
    else:
        rates = [dropout_p] * count
    loras: list[Lora | None] = []
    for i, (w, A, B, scaling, p) in enumerate(zip(weights, As, Bs, scalings, rates)):
        if A is None and B is None:
            loras.append(None)
            continue
        with _of_weight(i):
            check_lora(x, *w.shape, A, B, scaling, p)
        loras.append(Lora(A, B, float(scaling), float(p)))
    return group(x, weights, biases, loras)
