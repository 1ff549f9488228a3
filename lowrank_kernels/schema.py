"""Every operator of the library, once: schema string, fake, and the checks a user sees.

All backends implement these schemas; those of several weights that share x are in schema_groups.py, those of stacked
experts in schema_experts.py. Dimensions: M tokens, N out_features, K in_features, R LoRA rank, E experts. What a 4-bit
weight, a plan and the pages of adapters consist of is in arguments.py.
"""

from __future__ import annotations

import torch

from . import schema_experts, schema_groups  # noqa: F401  (they fill OPS)
from .arguments import (
    BLOCKSIZES,
    FLOAT_DTYPES,
    NESTED_BLOCKSIZE,
    PagesArgs,
    PlanArgs,
    WeightArgs,
    ceil_div,
    expect,
    expect_bias,
    expect_dtype,
    expect_lora,
    expect_matrix,
    expect_numel,
    expect_one_of,
    expect_pages,
    expect_plan,
    expect_shape,
    expect_weight,
    in_schema,
    s_width,
)
from .operators import NAMESPACE, OPS, PLAN, operator

WEIGHT, PAGES = in_schema(WeightArgs), in_schema(PagesArgs)
LORA = "Tensor A, Tensor B, float scaling"
DROPOUT = "float dropout_p, Tensor? seed"
NEEDS = "bool need_dx, bool need_dA, bool need_dB, bool need_dbias"


# -- operators: schema and fake, which gives shapes and dtypes of the outputs --------------------------------
# An output that is not needed (need_* False) is returned with zero elements. S is float32 [M, R].
# multi_lora_ adds to y in place. Of many adapters, S is [M, max_rank rounded up to RANK_STEP], zero past a
# row's rank, and gradients are float32 with the ranks of slot u in rows grad_rows[u] on (int32; -1: none),
# grad_rank rows in all: dA [grad_rank, K], and dB [grad_rank, N], transposed as the pages are.


@operator("(Tensor weight, Tensor code, int blocksize) -> (Tensor, Tensor)")
def _quantize_4bit(weight, code, blocksize):
    expect_dtype("weight", weight, FLOAT_DTYPES)
    expect_numel("code", code, torch.float32, 16)
    expect_one_of("blocksize", blocksize, BLOCKSIZES)
    packed = weight.new_empty((ceil_div(weight.numel(), 2), 1), dtype=torch.uint8)
    return packed, weight.new_empty(ceil_div(weight.numel(), blocksize), dtype=torch.float32)


@operator("(Tensor absmax, Tensor nested_code) -> (Tensor, Tensor, Tensor)")
def _double_quantize(absmax, nested_code):
    expect_dtype("absmax", absmax, (torch.float32,))
    expect_numel("nested_code", nested_code, torch.float32, 256)
    nested_absmax = absmax.new_empty(ceil_div(absmax.numel(), NESTED_BLOCKSIZE))
    return absmax.new_empty(absmax.numel(), dtype=torch.uint8), nested_absmax, absmax.new_empty(())


@operator(f"({WEIGHT}, ScalarType dtype) -> Tensor")
def _dequantize_4bit(w: WeightArgs, dtype):
    expect_weight(w)
    expect(dtype in FLOAT_DTYPES, "dtype", "one of {}, got {}", FLOAT_DTYPES, dtype)
    return w.code.new_empty((w.N, w.K), dtype=dtype)


@operator(f"(Tensor x, {WEIGHT}, Tensor? bias) -> Tensor")
def _linear_4bit(x, w: WeightArgs, bias):
    M, _ = expect_matrix("x", x)
    expect_weight(w)
    expect_shape("x", x, M, w.K)
    expect_bias(bias, w.N)
    return x.new_empty((M, w.N))


@operator(f"(Tensor dy, {WEIGHT}) -> Tensor")
def _linear_4bit_dx(dy, w: WeightArgs):
    M, _ = expect_matrix("dy", dy)
    expect_weight(w)
    expect_shape("dy", dy, M, w.N)
    return dy.new_empty((M, w.K))


def _lora_forward(x, N, K, A, B, bias, dropout_p, seed):
    M, _ = expect_matrix("x", x)
    expect_shape("x", x, M, K)
    expect_lora(A, B, N, K, dropout_p, seed)
    expect_bias(bias, N)
    return x.new_empty((M, N)), x.new_empty((M, A.shape[0]), dtype=torch.float32)


def _lora_backward(dy, x, s, N, K, A, B, bias, dropout_p, seed, needs):
    M, _ = expect_matrix("dy", dy)
    expect_shape("dy", dy, M, N)
    expect_shape("x", x, M, K)
    expect_lora(A, B, N, K, dropout_p, seed)
    expect_numel("s", s, torch.float32, M * A.shape[0])
    expect_bias(bias, N)
    need_dx, need_dA, need_dB, need_dbias = needs
    return (
        dy.new_empty((M, K) if need_dx else 0),
        A.new_empty(A.shape if need_dA else 0),
        B.new_empty(B.shape if need_dB else 0),
        (dy if bias is None else bias).new_empty(N if need_dbias else 0),
    )


@operator(f"(Tensor x, {WEIGHT}, {LORA}, Tensor? bias, {DROPOUT}) -> (Tensor, Tensor)")
def _lora_linear_4bit(x, w: WeightArgs, A, B, scaling, bias, dropout_p, seed):
    expect_weight(w)
    return _lora_forward(x, w.N, w.K, A, B, bias, dropout_p, seed)


@operator(
    f"(Tensor dy, Tensor x, Tensor s, {WEIGHT}, {LORA}, Tensor? bias, {DROPOUT}, {NEEDS})"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _lora_linear_4bit_backward(
    dy, x, s, w: WeightArgs, A, B, scaling, bias, dropout_p, seed,
    need_dx, need_dA, need_dB, need_dbias,
):  # fmt: skip
    expect_weight(w)
    needs = need_dx, need_dA, need_dB, need_dbias
    return _lora_backward(dy, x, s, w.N, w.K, A, B, bias, dropout_p, seed, needs)


@operator(f"(Tensor x, Tensor weight, {LORA}, Tensor? bias, {DROPOUT}) -> (Tensor, Tensor)")
def _lora_linear(x, weight, A, B, scaling, bias, dropout_p, seed):
    N, K = expect_matrix("weight", weight)
    return _lora_forward(x, N, K, A, B, bias, dropout_p, seed)


@operator(
    f"(Tensor dy, Tensor x, Tensor s, Tensor weight, {LORA}, Tensor? bias, {DROPOUT}, {NEEDS})"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _lora_linear_backward(
    dy, x, s, weight, A, B, scaling, bias, dropout_p, seed, need_dx, need_dA, need_dB, need_dbias
):
    N, K = expect_matrix("weight", weight)
    needs = need_dx, need_dA, need_dB, need_dbias
    return _lora_backward(dy, x, s, N, K, A, B, bias, dropout_p, seed, needs)


def _multi_forward(x, N, plan, pages):
    """S, and the checks of all that both operators take."""
    M, K = expect_matrix("x", x)
    expect_plan(plan, M)
    expect_pages(pages, N, K)
    return x.new_empty((M, s_width(plan)), dtype=torch.float32)


def _multi_backward(dy, x, s, plan, pages, grad_rows, grad_rank, need_dx):
    """dx, dA and dB, and the checks of all that both operators take."""
    (M, N), (_, K) = expect_matrix("dy", dy), expect_matrix("x", x)
    expect_shape("x", x, M, K)
    expect_plan(plan, M)
    expect_pages(pages, N, K)
    expect_numel("s", s, torch.float32, M * s_width(plan))
    expect_numel("grad_rows", grad_rows, torch.int32, pages.ranks.numel())
    expect(grad_rank >= 0, "grad_rank", "at least 0, got {}", grad_rank)
    return (
        dy.new_empty((M, K) if need_dx else 0),
        dy.new_empty((grad_rank, K), dtype=torch.float32),
        dy.new_empty((grad_rank, N), dtype=torch.float32),
    )


@operator(f"(Tensor(a!) y, Tensor x, {PLAN}, {PAGES}) -> Tensor")
def _multi_lora_(y, x, plan: PlanArgs, pages: PagesArgs):
    (_, N), (M, _) = expect_matrix("y", y), expect_matrix("x", x)
    expect_shape("y", y, M, N, dtypes=(x.dtype,))
    return _multi_forward(x, N, plan, pages)


@operator(
    f"(Tensor dy, Tensor x, Tensor s, {PLAN}, {PAGES}, Tensor grad_rows, int grad_rank, bool need_dx)"
    " -> (Tensor, Tensor, Tensor)"
)
def _multi_lora_backward(dy, x, s, plan: PlanArgs, pages: PagesArgs, grad_rows, grad_rank, need_dx):
    return _multi_backward(dy, x, s, plan, pages, grad_rows, grad_rank, need_dx)


@operator(f"(Tensor x, {WEIGHT}, {PLAN}, {PAGES}, Tensor? bias) -> (Tensor, Tensor)")
def _multi_lora_linear_4bit(x, w: WeightArgs, plan: PlanArgs, pages: PagesArgs, bias):
    expect_weight(w)
    M, _ = expect_matrix("x", x)
    expect_shape("x", x, M, w.K)
    expect_bias(bias, w.N)
    s = _multi_forward(x, w.N, plan, pages)
    return x.new_empty((M, w.N)), s


@operator(
    f"(Tensor dy, Tensor x, Tensor s, {WEIGHT}, {PLAN}, {PAGES}, Tensor? bias, "
    "Tensor grad_rows, int grad_rank, bool need_dx, bool need_dbias)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _multi_lora_linear_4bit_backward(
    dy, x, s, w: WeightArgs, plan: PlanArgs, pages: PagesArgs, bias,
    grad_rows, grad_rank, need_dx, need_dbias,
):  # fmt: skip
    expect_weight(w)
    M, _ = expect_matrix("dy", dy)
    expect_shape("dy", dy, M, w.N)
    expect_shape("x", x, M, w.K)
    gradients = _multi_backward(dy, x, s, plan, pages, grad_rows, grad_rank, need_dx)
    expect_bias(bias, w.N)
    return *gradients, (dy if bias is None else bias).new_empty(w.N if need_dbias else 0)


_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _op in OPS.items():
    _library.define(_name + _op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _op.fake, lib=_library)

ops = getattr(torch.ops, NAMESPACE)


# -- checks --------------------------------------------------------------------------------------------------
# For users: each names the argument, what was expected and what came.


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def check_float(name: str, tensor: torch.Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}")


def check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(
            f"{name}: expected a tensor on {device} like x, got one on {tensor.device}"
        )


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], words: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {words} = {shape}, got {tuple(tensor.shape)}")


def check_linear(x: torch.Tensor, N: int, K: int, weight_device: torch.device, bias) -> None:
    """The arguments every linear op shares: x [..., K] floating, bias [N] or None, one device."""
    check_float("x", x)
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x: expected shape [..., K] with K = {K}, got {tuple(x.shape)}")
    if weight_device != x.device:
        raise ValueError(f"weight: expected one on {x.device} like x, got one on {weight_device}")
    if bias is not None:
        check_float("bias", bias)
        check_shape("bias", bias, (N,), "[N]")
        check_device("bias", bias, x.device)


def check_lora(x: torch.Tensor, N: int, K: int, A, B, scaling: float, dropout_p: float) -> None:
    """A [R, K] and B [N, R] floating on x's device; 0 <= dropout_p < 1; scaling a number."""
    check_float("A", A)
    check_float("B", B)
    if A.dim() != 2 or A.shape[1] != K or A.shape[0] < 1:
        raise ValueError(f"A: expected shape [R, K] = [R >= 1, {K}], got {tuple(A.shape)}")
    check_shape("B", B, (N, A.shape[0]), "[N, R]")
    check_device("A", A, x.device)
    check_device("B", B, x.device)
    if not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling: expected a number, got {type(scaling).__name__}")
    if not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p: expected a number, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= dropout_p < 1, got {dropout_p}")
