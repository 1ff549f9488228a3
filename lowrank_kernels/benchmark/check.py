"""What a provider must compute: the dense product in float32, from the same 4-bit bytes."""

from __future__ import annotations

import functools

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


def expected(case: Case, group: int = 0) -> tuple[torch.Tensor, ...]:
    if group not in _kept(case):
        _kept(case)[group] = _computed(case, group)
    return _kept(case)[group]


def _computed(case: Case, group: int) -> tuple[torch.Tensor, ...]:
    """The results of the operator in float32, by plain PyTorch; of many adapters, those of ``group``.

    What is added to y is added to zeros.
    """
    W = providers.dense_weight(case.N, case.K, case.device)
    if not case.M:  # dequantize_4bit; quantize_4bit has to come back to the same values
        return (W,)
    if case.op == "linear_4bit_dx":
        return (providers.dy_of(case).float() @ W,)
    x, batch = providers.x_of(case).float(), []
    if case.popularity:
        batch = multi_providers.of_group(case, group)
    elif case.R:
        batch = [(slice(None), *(t.detach() for t in providers.adapter_of(case)))]
    if not case.op.endswith("fwd_bwd"):
        y = torch.zeros(case.M, case.N, device=case.device)
        if case.op != "multi_lora_":
            y += x @ W.T
        for rows, A, B in batch:
            y[rows] += providers.SCALING * x[rows] @ A.T @ B.T
        return (y,)
    dy, gradients = providers.dy_of(case).float(), []
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


def verify(case: Case, outputs: list, tolerance: float = TOLERANCE) -> None:
    """Raises Wrong unless every one of ``outputs`` is what ``case`` asks for."""
    errors = []
    for index, output in enumerate(outputs):
        wanted = expected(case, index % case.groups if case.popularity else 0)
        tensors = _tensors(output)
        shapes = [tuple(t.shape) for t in tensors]
        if shapes != [tuple(t.shape) for t in wanted]:
            raise Wrong(f"shapes {shapes} instead of {[tuple(t.shape) for t in wanted]}")
        errors += [(t.detach().float() - w).norm() / w.norm() for t, w in zip(tensors, wanted)]
    largest = float(torch.stack(errors).max())  # max() keeps a NaN, and a NaN is never below
    if not largest < tolerance:
        raise Wrong(f"wrong result: relative error {largest:.2g}, allowed is {tolerance}")
