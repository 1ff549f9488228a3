"""What a provider must compute: the dense product in float32, from the same 4-bit bytes."""

from __future__ import annotations

import functools

import torch

import lowrank_kernels as lk
from lowrank_kernels import reference

from . import multi_providers, providers
from .case import POOL, Case

TOLERANCE = 2e-2  # of the norm; results in bfloat16 stay under 0.7e-2


class Wrong(Exception):
    """A result that is not the operator's."""


@functools.lru_cache(maxsize=1)
def expected(case: Case) -> tuple[torch.Tensor, ...]:
    """The results of the operator in float32, by plain PyTorch."""
    W = providers.dense_weight(case.N, case.K, case.device)
    if not case.M:  # dequantize_4bit; quantize_4bit has to come back to the same values
        return (W,)
    if case.op == "linear_4bit_dx":
        return (providers.dy_of(case).float() @ W,)
    x = providers.x_of(case).float()
    if case.op in ("linear_4bit", "linear_4bit_growth"):
        return (x @ W.T,)
    A, B = (t.detach() for t in providers.adapter_of(case))
    if case.op == "lora_linear_4bit":
        return (x @ W.T + providers.SCALING * (x @ A.T) @ B.T,)
    dy = providers.dy_of(case).float()
    dS = providers.SCALING * dy @ B
    return dy @ W + dS @ A, dS.T @ x, providers.SCALING * dy.T @ (x @ A.T)


@functools.lru_cache(maxsize=POOL)
def expected_of_many(case: Case, group: int) -> tuple[torch.Tensor, ...]:
    """The same where rows have adapters: those of ``group``. What is added to y is added to zeros."""
    batch = multi_providers.of_group(case, group)
    x = providers.x_of(case).float()
    y = torch.cat([providers.SCALING * x[rows] @ A.T @ B.T for rows, A, B in batch])
    if case.op == "multi_lora_":
        return (y,)
    W = providers.dense_weight(case.N, case.K, case.device)
    if case.op == "multi_lora_linear_4bit":
        return (y + x @ W.T,)
    dy, dx, gradients = providers.dy_of(case).float(), [], []
    for rows, A, B in batch:
        dS = providers.SCALING * dy[rows] @ B
        dx.append(dS @ A)
        gradients += [dS.T @ x[rows], providers.SCALING * dy[rows].T @ (x[rows] @ A.T)]
    return (dy @ W + torch.cat(dx), *gradients)


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
        many = bool(case.popularity)
        wanted = expected_of_many(case, index % case.groups) if many else expected(case)
        tensors = _tensors(output)
        shapes = [tuple(t.shape) for t in tensors]
        if shapes != [tuple(t.shape) for t in wanted]:
            raise Wrong(f"shapes {shapes} instead of {[tuple(t.shape) for t in wanted]}")
        errors += [(t.detach().float() - w).norm() / w.norm() for t, w in zip(tensors, wanted)]
    largest = float(torch.stack(errors).max())  # max() keeps a NaN, and a NaN is never below
    if not largest < tolerance:
        raise Wrong(f"wrong result: relative error {largest:.2g}, allowed is {tolerance}")
