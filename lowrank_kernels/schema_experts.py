"""The operators of stacked experts, of which each row of x meets one: schema string and fake, as in schema.py.

A stack is one 4-bit weight with E matrices of equal shape, ``[E, N, K]``, or ``transposed`` ``[E, K, N]``; its nine
arguments are those of the matrix ``[E*N, K]`` or ``[E*K, N]`` that its rows are. Rows of x come sorted by expert:
``offsets`` is int32 [E], and rows offsets[e-1] to offsets[e] (from 0 on for e = 0) belong to expert e. Rows from
offsets[E-1] on belong to none: their outputs are zero. Outputs that are not needed are empty, as in schema.py.
"""

from __future__ import annotations

import torch

from .arguments import (
    FLOAT_DTYPES,
    WeightArgs,
    expect,
    expect_dtype,
    expect_matrix,
    expect_numel,
    expect_shape,
    expect_weight,
    in_schema,
)
from .operators import OPS, operator

__all__ = ["OPS"]

STACK = f"{in_schema(WeightArgs)}, Tensor offsets, bool transposed"
LORA = "Tensor A, Tensor B, float scaling"


def expert_shape(w: WeightArgs, experts: int, transposed: bool) -> tuple[int, int]:
    """N and K of each of the experts whose stack ``w`` is."""
    rows = w.N // experts
    return (w.K, rows) if transposed else (rows, w.K)


def _expect_stack(w: WeightArgs, offsets: torch.Tensor, transposed: bool) -> tuple[int, int, int]:
    """E, N and K."""
    expect_weight(w)
    expect_dtype("offsets", offsets, (torch.int32,))
    expect(offsets.dim() == 1, "offsets", "shape [E], got {}", tuple(offsets.shape))
    experts = offsets.shape[0]
    expect(experts > 0, "offsets", "shape [E] with E > 0, got {}", tuple(offsets.shape))
    expect(w.N % experts == 0, "N", "a multiple of the {} experts, got {}", experts, w.N)
    return experts, *expert_shape(w, experts, transposed)


def _expect_adapters(A, B, experts: int, N: int, K: int) -> int:
    """R, the rank of the adapter of each expert."""
    expect_dtype("A", A, FLOAT_DTYPES)
    expect(A.dim() == 3, "A", "shape [E, R, K], got {}", tuple(A.shape))
    R = A.shape[1]
    expect_shape("A", A, experts, R, K)
    expect_shape("B", B, experts, N, R)
    return R


def _expect_x(x: torch.Tensor, K: int) -> int:
    M, _ = expect_matrix("x", x)
    expect_shape("x", x, M, K)
    return M


def _expect_bias(bias: torch.Tensor | None, experts: int, N: int) -> None:
    if bias is not None:
        expect_shape("bias", bias, experts, N)


@operator(f"(Tensor x, {STACK}, Tensor? bias) -> Tensor")
def _grouped_linear_4bit(x, w: WeightArgs, offsets, transposed, bias):
    experts, N, K = _expect_stack(w, offsets, transposed)
    M = _expect_x(x, K)
    _expect_bias(bias, experts, N)
    return x.new_empty((M, N))


@operator(f"(Tensor x, {STACK}, {LORA}, Tensor? bias) -> (Tensor, Tensor)")
def _grouped_lora_linear_4bit(x, w: WeightArgs, offsets, transposed, A, B, scaling, bias):
    experts, N, K = _expect_stack(w, offsets, transposed)
    M = _expect_x(x, K)
    R = _expect_adapters(A, B, experts, N, K)
    _expect_bias(bias, experts, N)
    return x.new_empty((M, N)), x.new_empty((M, R), dtype=torch.float32)


@operator(
    f"(Tensor dy, Tensor x, Tensor s, {STACK}, {LORA}, bool need_dx, bool need_dA, bool need_dB)"
    " -> (Tensor, Tensor, Tensor)"
)
def _grouped_lora_linear_4bit_backward(
    dy, x, s, w: WeightArgs, offsets, transposed, A, B, scaling, need_dx, need_dA, need_dB
):
    experts, N, K = _expect_stack(w, offsets, transposed)
    M, _ = expect_matrix("dy", dy)
    expect_shape("dy", dy, M, N)
    expect_shape("x", x, M, K)
    R = _expect_adapters(A, B, experts, N, K)
    expect_numel("s", s, torch.float32, M * R)
    return (
        dy.new_empty((M, K) if need_dx else 0),
        A.new_empty((experts, R, K) if need_dA else 0),
        B.new_empty((experts, N, R) if need_dB else 0),
    )
