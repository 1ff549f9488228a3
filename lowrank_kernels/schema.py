"""Every operator of the library, once: schema string, fake, and the checks a user sees.

All backends implement these schemas. Dimensions: M tokens, N out_features, K in_features, R LoRA rank.

A 4-bit weight travels as nine flat arguments (``WEIGHT``), made by :meth:`Weight4bit.op_args`:

====================  =========================================================================================
``packed``            contiguous, ``ceil(N*K/2)`` bytes of any dtype; element ``2i`` is the high nibble of byte i
``absmax``            ``[nblk]``, ``nblk = ceil(N*K/blocksize)``; float32, or uint8 when double-quantized
``code``              float32 ``[16]``: the value of each nibble
``nested_absmax``     float32 ``[ceil(nblk/256)]`` or None
``nested_code``       float32 ``[256]`` or None
``nested_offset``     float32, one element, or None
``N, K, blocksize``   integers
====================  =========================================================================================

A batch with many adapters travels as a plan (``PLAN``: which row has which adapter, the same for every module;
made by :class:`multi_lora.Plan`) and as the pages of one module (``PAGES``, :class:`multi_lora.ModulePages`):

====================  =========================================================================================
``tiles``             int32 ``[tiles, 4]``: slot, row0, rows, page0; up to ``tile_rows`` rows that share an adapter,
                      ``rows[row0 : row0 + rows]``, with pages ``page_ids[page0:]``. Tiles of one slot are adjacent
``page_ids``          int32: the pages of each adapter of the batch
``tile_of_row``       int32 ``[M]``: the tile of each row; -1: it has no adapter
``rows``              int32: row numbers by slot, ascending within a slot
``tile_rows``         16, 32, 64 or 128
``max_rank``          of any adapter of the plan in any module
``A_pages, B_pages``  floating ``[pages, page_rank, K]`` and ``[pages, page_rank, N]`` (B transposed), contiguous.
                      Rank r of an adapter is row ``r % page_rank`` of its page ``r // page_rank``
``ranks``             int32 ``[slots]``; 0: the adapter does not cover this module
``scalings``          float32 ``[slots]``
``dropout_p``         float64 ``[slots]``; in force only where there is a ``seed``
====================  =========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

NAMESPACE = "lowrank_kernels"
NESTED_BLOCKSIZE = 256
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor code, Tensor? nested_absmax, Tensor? nested_code, "
    "Tensor? nested_offset, int N, int K, int blocksize"
)
LORA = "Tensor A, Tensor B, float scaling"
DROPOUT = "float dropout_p, Tensor? seed"
NEEDS = "bool need_dx, bool need_dA, bool need_dB, bool need_dbias"
PLAN = "Tensor tiles, Tensor page_ids, Tensor tile_of_row, Tensor rows, int tile_rows, int max_rank"
PAGES = (
    "Tensor A_pages, Tensor B_pages, Tensor ranks, Tensor scalings, Tensor dropout_p, Tensor? seed"
)
RANK_STEP = 8  # S is as many columns wide as whole steps of ranks hold max_rank


class Op(NamedTuple):
    """One operator: its schema (without the name) and its fake, which gives output shapes and dtypes."""

    schema: str
    fake: Callable


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# -- fakes ---------------------------------------------------------------------------------------------------


def _quantize_4bit(weight, code, blocksize):
    packed = weight.new_empty((ceil_div(weight.numel(), 2), 1), dtype=torch.uint8)
    return packed, weight.new_empty(ceil_div(weight.numel(), blocksize), dtype=torch.float32)


def _double_quantize(absmax, nested_code):
    nested_absmax = absmax.new_empty(ceil_div(absmax.numel(), NESTED_BLOCKSIZE))
    return absmax.new_empty(absmax.numel(), dtype=torch.uint8), nested_absmax, absmax.new_empty(())


def _dequantize_4bit(
    packed, absmax, code, nested_absmax, nested_code, nested_offset, N, K, blocksize, dtype
):
    return code.new_empty((N, K), dtype=dtype)


def _linear_4bit(
    x, packed, absmax, code, nested_absmax, nested_code, nested_offset, N, K, blocksize, bias
):
    return x.new_empty((x.shape[0], N))


def _linear_4bit_dx(
    dy, packed, absmax, code, nested_absmax, nested_code, nested_offset, N, K, blocksize
):
    return dy.new_empty((dy.shape[0], K))


def _lora_forward(x, N, R):
    M = x.shape[0]
    return x.new_empty((M, N)), x.new_empty((M, R), dtype=torch.float32)


def _lora_backward(dy, K, A, B, bias, needs):
    need_dx, need_dA, need_dB, need_dbias = needs
    M, N = dy.shape
    return (
        dy.new_empty((M, K) if need_dx else 0),
        A.new_empty(A.shape if need_dA else 0),
        B.new_empty(B.shape if need_dB else 0),
        (dy if bias is None else bias).new_empty(N if need_dbias else 0),
    )


def _lora_linear_4bit(
    x, packed, absmax, code, nested_absmax, nested_code, nested_offset, N, K, blocksize,
    A, B, scaling, bias, dropout_p, seed,
):  # fmt: skip
    return _lora_forward(x, N, A.shape[0])


def _lora_linear_4bit_backward(
    dy, x, s, packed, absmax, code, nested_absmax, nested_code, nested_offset, N, K, blocksize,
    A, B, scaling, bias, dropout_p, seed, need_dx, need_dA, need_dB, need_dbias,
):  # fmt: skip
    return _lora_backward(dy, K, A, B, bias, (need_dx, need_dA, need_dB, need_dbias))


def _lora_linear(x, weight, A, B, scaling, bias, dropout_p, seed):
    return _lora_forward(x, weight.shape[0], A.shape[0])


def _lora_linear_backward(
    dy, x, s, weight, A, B, scaling, bias, dropout_p, seed, need_dx, need_dA, need_dB, need_dbias
):
    return _lora_backward(dy, weight.shape[1], A, B, bias, (need_dx, need_dA, need_dB, need_dbias))


def _s_of_plan(x, max_rank):
    return x.new_empty((x.shape[0], ceil_div(max_rank, RANK_STEP) * RANK_STEP), dtype=torch.float32)


def _multi_lora_(
    y, x, tiles, page_ids, tile_of_row, rows, tile_rows, max_rank,
    A_pages, B_pages, ranks, scalings, dropout_p, seed,
):  # fmt: skip
    return _s_of_plan(x, max_rank)


def _multi_gradients(A_pages, B_pages, grad_rank):
    return (
        A_pages.new_empty((grad_rank, A_pages.shape[2]), dtype=torch.float32),
        B_pages.new_empty((grad_rank, B_pages.shape[2]), dtype=torch.float32),
    )


def _multi_lora_backward(
    dy, x, s, tiles, page_ids, tile_of_row, rows, tile_rows, max_rank,
    A_pages, B_pages, ranks, scalings, dropout_p, seed, grad_rows, grad_rank, need_dx,
):  # fmt: skip
    dx = dy.new_empty((dy.shape[0], A_pages.shape[2]) if need_dx else 0)
    return dx, *_multi_gradients(A_pages, B_pages, grad_rank)


def _multi_lora_linear_4bit(
    x, packed, absmax, code, nested_absmax, nested_code, nested_offset, N, K, blocksize,
    tiles, page_ids, tile_of_row, rows, tile_rows, max_rank,
    A_pages, B_pages, ranks, scalings, dropout_p, seed, bias,
):  # fmt: skip
    return x.new_empty((x.shape[0], N)), _s_of_plan(x, max_rank)


def _multi_lora_linear_4bit_backward(
    dy, x, s, packed, absmax, code, nested_absmax, nested_code, nested_offset, N, K, blocksize,
    tiles, page_ids, tile_of_row, rows, tile_rows, max_rank,
    A_pages, B_pages, ranks, scalings, dropout_p, seed, bias,
    grad_rows, grad_rank, need_dx, need_dbias,
):  # fmt: skip
    return (
        dy.new_empty((dy.shape[0], K) if need_dx else 0),
        *_multi_gradients(A_pages, B_pages, grad_rank),
        (dy if bias is None else bias).new_empty(N if need_dbias else 0),
    )


# An output that is not needed (need_* False) is returned with zero elements. S is float32 [M, R].
# multi_lora_ adds to y in place. Of many adapters, S is [M, max_rank rounded up to RANK_STEP], zero past a
# row's rank, and gradients are float32 with the ranks of slot u in rows grad_rows[u] on (int32; -1: none),
# grad_rank rows in all: dA [grad_rank, K], and dB [grad_rank, N], transposed as the pages are.
OPS: dict[str, Op] = {
    "quantize_4bit": Op(
        "(Tensor weight, Tensor code, int blocksize) -> (Tensor, Tensor)", _quantize_4bit
    ),
    "double_quantize": Op(
        "(Tensor absmax, Tensor nested_code) -> (Tensor, Tensor, Tensor)", _double_quantize
    ),
    "dequantize_4bit": Op(f"({WEIGHT}, ScalarType dtype) -> Tensor", _dequantize_4bit),
    "linear_4bit": Op(f"(Tensor x, {WEIGHT}, Tensor? bias) -> Tensor", _linear_4bit),
    "linear_4bit_dx": Op(f"(Tensor dy, {WEIGHT}) -> Tensor", _linear_4bit_dx),
    "lora_linear_4bit": Op(
        f"(Tensor x, {WEIGHT}, {LORA}, Tensor? bias, {DROPOUT}) -> (Tensor, Tensor)",
        _lora_linear_4bit,
    ),
    "lora_linear_4bit_backward": Op(
        f"(Tensor dy, Tensor x, Tensor s, {WEIGHT}, {LORA}, Tensor? bias, {DROPOUT}, {NEEDS})"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        _lora_linear_4bit_backward,
    ),
    "lora_linear": Op(
        f"(Tensor x, Tensor weight, {LORA}, Tensor? bias, {DROPOUT}) -> (Tensor, Tensor)",
        _lora_linear,
    ),
    "lora_linear_backward": Op(
        f"(Tensor dy, Tensor x, Tensor s, Tensor weight, {LORA}, Tensor? bias, {DROPOUT}, {NEEDS})"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        _lora_linear_backward,
    ),
    "multi_lora_": Op(f"(Tensor(a!) y, Tensor x, {PLAN}, {PAGES}) -> Tensor", _multi_lora_),
    "multi_lora_backward": Op(
        f"(Tensor dy, Tensor x, Tensor s, {PLAN}, {PAGES}, Tensor grad_rows, int grad_rank, bool need_dx)"
        " -> (Tensor, Tensor, Tensor)",
        _multi_lora_backward,
    ),
    "multi_lora_linear_4bit": Op(
        f"(Tensor x, {WEIGHT}, {PLAN}, {PAGES}, Tensor? bias) -> (Tensor, Tensor)",
        _multi_lora_linear_4bit,
    ),
    "multi_lora_linear_4bit_backward": Op(
        f"(Tensor dy, Tensor x, Tensor s, {WEIGHT}, {PLAN}, {PAGES}, Tensor? bias, "
        "Tensor grad_rows, int grad_rank, bool need_dx, bool need_dbias)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        _multi_lora_linear_4bit_backward,
    ),
}

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
