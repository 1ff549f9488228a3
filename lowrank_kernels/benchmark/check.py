"""What a provider must compute: the dense product of the same 4-bit bytes, or of weights of its own.

It is computed in float64, on a GPU, where that may take long, in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

import lowrank_kernels as lk
from lowrank_kernels import reference

from . import multi_providers, providers
from .case import Case

TOLERANCE = 2e-2  # of the norm; results in bfloat16 stay under 0.7e-2


class Wrong(Exception):
    """A result that is not the operator's."""


@functools.lru_cache(maxsize=1)
def _kept(case: Case) -> dict[int, tuple[torch.Tensor, ...]]:
    """The results of the last case, by group."""
    return {}


def expected(
    case: Case, group: int = 0, weight: Callable | None = None
) -> tuple[torch.Tensor, ...]:
    """``weight``: see :func:`verify`."""
    if weight:
        return _computed(case, group, weight(case.N, case.K))
    if group not in _kept(case):
        dense = providers.dense_weight(case.N, case.K, case.device)
        _kept(case)[group] = _computed(case, group, dense)
    return _kept(case)[group]


def _computed(case: Case, group: int, W: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The results of the operator by plain PyTorch; of many adapters, those of ``group``.

    What is added to y is added to zeros.
    """
    wide = torch.float32 if case.device == "cuda" else torch.float64
    W = W.to(wide)
    if not case.M:  # dequantize_4bit; quantize_4bit has to come back to the same values
        return (W,)
    if case.op == "linear_4bit_dx":
        return (providers.dy_of(case).to(wide) @ W,)
    x, batch = providers.x_of(case).to(wide), []
    if case.popularity:
        batch = multi_providers.of_group(case, group)
    elif case.R:
        batch = [(slice(None), *(t.detach() for t in providers.adapter_of(case)))]
    batch = [(rows, A.to(wide), B.to(wide)) for rows, A, B in batch]
    if not case.op.endswith("fwd_bwd"):
        y = torch.zeros(case.M, case.N, device=case.device, dtype=wide)
        if case.op != "multi_lora_":
            y += x @ W.T
        for rows, A, B in batch:
            y[rows] += providers.SCALING * x[rows] @ A.T @ B.T
        return (y,)
    dy, gradients = providers.dy_of(case).to(wide), []
    dx = dy @ W
    for rows, A, B in batch:
        dS = providers.SCALING * dy[rows] @ B
        dx[rows] += dS @ A
        gradients += [dS.T @ x[rows], providers.SCALING * dy[rows].T @ (x[rows] @ A.T)]
    return (dx, *gradients)


def _tensors(output: object) -> tuple[torch.Tensor, ...]:
    """The matrices in what a provider returned; a quantized weight is dequantized."""
    if isinstance(output, torch.Tensor):
        return (output,)
    if isinstance(output, lk.Weight4bit):
        return (reference.dequantize_4bit(*output.op_args()),)
    if all(isinstance(part, torch.Tensor) for part in output):
        return tuple(output)
    return (providers.bnb_dequantize(*output).float(),)


def verify(
    case: Case,
    outputs: list,
    tolerance: float = TOLERANCE,
    weight: Callable[[int, int], torch.Tensor] | None = None,
) -> float:
    """The largest relative error of ``outputs``. Raises Wrong unless every one is what ``case`` asks for.

    ``weight`` gives, of N and K, the dense values of the weight where it is another one than ours.
    """
    errors = []
    for index, output in enumerate(outputs):
        wanted = expected(case, index % case.groups if case.popularity else 0, weight)
        tensors = _tensors(output)
        shapes = [tuple(t.shape) for t in tensors]
        if shapes != [tuple(t.shape) for t in wanted]:
            raise Wrong(f"shapes {shapes} instead of {[tuple(t.shape) for t in wanted]}")
        errors += [relative_error(t, w) for t, w in zip(tensors, wanted)]
    return within(errors, tolerance)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (found.detach().to(wanted.dtype) - wanted).norm() / wanted.norm()


def within(errors: list[torch.Tensor], tolerance: float, what: str = "result") -> float:
    """The largest error. Raises Wrong if it is not below ``tolerance``."""
    largest = float(torch.stack(errors).max())  # max() keeps a NaN, and a NaN is never below
    if not largest < tolerance:
        raise Wrong(f"wrong {what}: relative error {largest:.2g}, allowed is {tolerance:.2g}")
    return largest
