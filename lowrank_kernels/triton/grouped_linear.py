"""Stacked experts, of which each row of x meets one: y = x W_eᵀ + scaling S B_eᵀ + bias_e, and the gradients.

Offsets stay on the device: a program counts the tiles of the experts before its own. There are as many programs as
tiles may be, and those past the last one do nothing. Sums over the rows of an expert go in their order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..arguments import WeightArgs, ceil_div, flat
from ..schema_experts import expert_shape
from . import dequant_dot
from .launch import launch, on_nvidia, precision_of
from .matmul import kind_of
from .primitives import dot, rounded
from .unpack import DTYPES, Unpack, pairs, require, sizes


class Factor(NamedTuple):
    """rows [M, R] times each expert's factor [R, columns], times ``scaling``."""

    rows: torch.Tensor  # float32, contiguous
    factor: torch.Tensor
    stride_e: int  # of factor
    stride_r: int
    stride_j: int
    R: int
    scaling: float


@triton.jit
def _tile_of(offsets, E, M, tile, BM: tl.constexpr):
    """Expert, first row and end of its rows of a tile of BM rows; expert E has the rows of none, and E + 1 no tile."""
    expert, first, last = E + 1, M, M
    start, tiles = M * 0, M * 0
    for e in range(0, E + 1):
        end = tl.where(e < E, tl.load(offsets + e, e < E, 0), M)
        end = tl.minimum(tl.maximum(end, start), M)
        here = tl.cdiv(end - start, BM)
        hit = (tile >= tiles) & (tile < tiles + here)
        expert = tl.where(hit, e, expert)
        first = tl.where(hit, start + (tile - tiles) * BM, first)
        last = tl.where(hit, end, last)
        tiles += here
        start = end
    return expert, first, last


@triton.jit
def _factor_tile(a, e, m, last, j, J, PRECISION: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr):
    """What the adapter of expert e adds to rows m and columns j."""
    acc = tl.zeros((BM, BJ), tl.float32)
    own = e.to(tl.int64) * a.stride_e
    for r0 in range(0, a.R, 16):
        r = r0 + tl.arange(0, 16)
        at = m.to(tl.int64)[:, None] * a.R + r[None, :]
        left = tl.load(a.rows + at, (m < last)[:, None] & (r < a.R)[None, :], 0.0)
        at = own + r.to(tl.int64)[:, None] * a.stride_r + j.to(tl.int64)[None, :] * a.stride_j
        right = tl.load(a.factor + at, (r < a.R)[:, None] & (j < J)[None, :], 0.0)
        acc = dot(left, right, acc, PRECISION)
    return acc * a.scaling


@triton.jit(do_not_specialize=["M", "E"])
def _grouped(
    x, w, adapter, bias, out, offsets, E, M, size, K, x_stride, out_stride,
    dtype: tl.constexpr, BASE: tl.constexpr, TRANSPOSED: tl.constexpr, SHIFT: tl.constexpr,
    PRECISION: tl.constexpr, PRMT: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A tile of x W_eᵀ, or of x W_e where ``TRANSPOSED``; W_e is rows e size .. of w [E size, K]."""
    J, depth = (K, size) if TRANSPOSED else (size, K)
    columns = tl.cdiv(J, BJ)
    j0 = tl.program_id(0) % columns * BJ
    expert, first, last = _tile_of(offsets, E, M, tl.program_id(0) // columns, BM)
    if expert > E:
        return
    m, j = first + tl.arange(0, BM), j0 + tl.arange(0, BJ)
    acc = tl.zeros((BM, BJ), tl.float32)
    if expert < E:
        row = expert.to(tl.int64) * size
        if TRANSPOSED:
            acc = dequant_dot.backward(
                x, w, x_stride, 0, m, j0, last, size, K, 0, tl.cdiv(depth, BD), row, dtype, BASE, SHIFT, PRECISION,
                BM, BJ, BD,
            )  # fmt: skip
        else:
            acc = dequant_dot.forward(
                x, w, x_stride, 0, m, row + j, last, row + size, K, 0, tl.cdiv(depth, BD), dtype, BASE, SHIFT,
                PRECISION, PRMT, BM, BJ, BD,
            )  # fmt: skip
        if adapter is not None:
            acc += _factor_tile(adapter, expert, m, last, j, J, PRECISION, BM, BJ)
        if bias is not None:
            at = expert.to(tl.int64) * J + j
            acc += tl.load(bias + at, j < J, 0.0).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * out_stride + j[None, :]
    tl.store(out + at, rounded(acc, out.dtype.element_ty), (m < last)[:, None] & (j < J)[None, :])


@triton.jit(do_not_specialize=["M", "E"])
def _shrink(
    act, factor, out, offsets, E, M, C, R, act_stride, stride_e, stride_c, stride_r, scale,
    PRECISION: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[m, r] = scale Σ_c act[m, c] factor_e[c, r]; zero for rows of no expert."""
    columns = tl.cdiv(R, BR)
    r = tl.program_id(0) % columns * BR + tl.arange(0, BR)
    expert, first, last = _tile_of(offsets, E, M, tl.program_id(0) // columns, BM)
    if expert > E:
        return
    m = first + tl.arange(0, BM)
    acc = tl.zeros((BM, BR), tl.float32)
    if expert < E:
        own = expert.to(tl.int64) * stride_e
        for c0 in range(0, C, BC):
            c = c0 + tl.arange(0, BC)
            at = m.to(tl.int64)[:, None] * act_stride + c[None, :]
            left = tl.load(act + at, (m < last)[:, None] & (c < C)[None, :], 0.0)
            at = own + c.to(tl.int64)[:, None] * stride_c + r.to(tl.int64)[None, :] * stride_r
            right = tl.load(factor + at, (c < C)[:, None] & (r < R)[None, :], 0.0)
            acc = dot(left, right, acc, PRECISION)
    at = m.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(out + at, acc * scale, (m < last)[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["M", "E"])
def _gradient(
    act, rows, out, offsets, E, M, C, R, act_stride, out_e, out_c, out_r, scale,
    PRECISION: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out_e[c, r] = scale Σ_m act[m, c] rows[m, r] over the rows of each expert, in their order."""
    tiles_c, tiles_r = tl.cdiv(C, BC), tl.cdiv(R, BR)
    pid = tl.program_id(0)
    c, r = pid % tiles_c * BC + tl.arange(0, BC), pid // tiles_c % tiles_r * BR + tl.arange(0, BR)
    expert = pid // tiles_c // tiles_r
    start, end = M * 0, M * 0
    for e in range(0, expert + 1):
        start = end
        end = tl.minimum(tl.maximum(tl.load(offsets + e), start), M)
    acc = tl.zeros((BC, BR), tl.float32)
    for m0 in range(start, end, BM):
        m = m0 + tl.arange(0, BM)
        at = m.to(tl.int64)[None, :] * act_stride + c[:, None]
        left = tl.load(act + at, (m < end)[None, :] & (c < C)[:, None], 0.0)
        at = m.to(tl.int64)[:, None] * R + r[None, :]
        right = tl.load(rows + at, (m < end)[:, None] & (r < R)[None, :], 0.0)
        acc = dot(left, right, acc, PRECISION)
    at = (
        expert.to(tl.int64) * out_e
        + c.to(tl.int64)[:, None] * out_c
        + r.to(tl.int64)[None, :] * out_r
    )
    tl.store(
        out + at, rounded(acc * scale, out.dtype.element_ty), (c < C)[:, None] & (r < R)[None, :]
    )


# -- what starts them ------------------------------------------------------------------------------


class _Call:
    """The arguments that all three operators share, checked."""

    def __init__(self, rows: torch.Tensor, w: WeightArgs, offsets: torch.Tensor, transposed: bool):
        self.unpack, self.M, self.transposed = Unpack(rows), rows.shape[0], transposed
        self.weight, self.E, self.args = self.unpack.weight(w), offsets.numel(), w
        require(self.E > 0 and w.N % self.E == 0, f"N: expected a multiple of {self.E}, got {w.N}")
        self.N, self.K = expert_shape(w, self.E, transposed)
        self.offsets = self.unpack.data("offsets", offsets, torch.int32, self.E)
        sizes(M=self.M, E=self.E)

    def tiles(self, rows: int) -> int:
        """At most so many tiles of ``rows`` rows there are, those of rows without an expert too."""
        return ceil_div(self.M, rows) + self.E + 1

    def factors(self, A: torch.Tensor, B: torch.Tensor) -> int:
        """R, after the checks of A [E, R, K] and B [E, N, R]."""
        E, R = self.E, A.shape[1]
        sizes(R=R)
        for name, t, shape in (("A", A, (E, R, self.K)), ("B", B, (E, self.N, R))):
            self.unpack.on_device(name, t)
            require(tuple(t.shape) == shape, f"{name}: expected {shape}, got {tuple(t.shape)}")
            require(t.dtype in DTYPES, f"{name}: expected floating, got {t.dtype}")
        return R


def _product(
    call: _Call,
    x: torch.Tensor,
    transposed: bool,
    adapter: Factor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x W_eᵀ, or x W_e where ``transposed``, of each expert."""
    w, size = call.args, call.args.N // call.E
    J = w.K if transposed else size
    out = x.new_empty((call.M, J))
    if call.M == 0 or J == 0:
        return out
    kind = kind_of(call.weight, w.K, w.blocksize)
    left = pairs(x) if kind == "runs" and not transposed else x
    few, exact = call.M <= 16 * call.E, x.dtype == torch.float32
    rows, columns = (16, 64) if few else (32, 64 if kind == "runs" and not exact else 32)
    if exact and kind == "elements":  # more of them do not fit into the registers of a program
        rows, columns = 16, 32
    if kind == "runs" and transposed:
        columns = min(columns, w.blocksize)
    launch(
        _grouped, call.tiles(rows) * ceil_div(J, columns), left, call.weight, adapter, bias, out,
        call.offsets, call.E, call.M, size, w.K, left.stride(0), J,
        dtype=DTYPES[x.dtype], BASE=kind, TRANSPOSED=transposed, SHIFT=w.blocksize.bit_length() - 1,
        PRECISION=precision_of(x.dtype),
        PRMT=kind == "runs" and not transposed and x.dtype != torch.float32 and on_nvidia(),
        BM=rows, BJ=columns, BD=32, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def _rows(
    call: _Call, act: torch.Tensor, factor: torch.Tensor, strides: tuple[int, int, int], R: int, scale: float
) -> torch.Tensor:  # fmt: skip
    """S or dS: float32 [M, R]. ``strides`` of factor: expert, column of act, rank."""
    out = act.new_empty((call.M, R), dtype=torch.float32)
    if call.M:
        br = min(64, max(16, triton.next_power_of_2(R)))
        launch(
            _shrink, call.tiles(16) * ceil_div(R, br), act, factor, out, call.offsets, call.E, call.M,
            act.shape[1], R, act.stride(0), *strides, scale,
            PRECISION=precision_of(act.dtype), BM=16, BC=32, BR=br, num_warps=4, num_stages=2,
        )  # fmt: skip
    return out


def _of_rows(
    call: _Call, out: torch.Tensor, strides: tuple[int, int, int], act: torch.Tensor, rows: torch.Tensor, scale: float
) -> None:  # fmt: skip
    """dA or dB. ``strides`` of out: expert, column of act, rank."""
    C, R = act.shape[1], rows.shape[1]
    br = min(64, max(16, triton.next_power_of_2(R)))
    launch(
        _gradient, call.E * ceil_div(C, 64) * ceil_div(R, br), act, rows, out, call.offsets, call.E,
        call.M, C, R, act.stride(0), *strides, scale,
        PRECISION=precision_of(act.dtype), BM=16, BC=64, BR=br, num_warps=4, num_stages=2,
    )  # fmt: skip


def _bias(call: _Call, bias: torch.Tensor | None) -> torch.Tensor | None:
    if bias is None:
        return None
    call.unpack.on_device("bias", bias)
    shape = call.E, call.N
    require(tuple(bias.shape) == shape, f"bias: expected {shape}, got {tuple(bias.shape)}")
    require(bias.dtype in DTYPES, f"bias: expected floating, got {bias.dtype}")
    return bias.contiguous()


@flat
def grouped_linear_4bit(x, w: WeightArgs, offsets, transposed, bias) -> torch.Tensor:
    call = _Call(x, w, offsets, transposed)
    x = call.unpack.matrix("x", x, call.M, call.K)
    return _product(call, x, transposed, None, _bias(call, bias))


@flat
def grouped_lora_linear_4bit(x, w: WeightArgs, offsets, transposed, A, B, scaling, bias):
    call = _Call(x, w, offsets, transposed)
    x, R = call.unpack.matrix("x", x, call.M, call.K), call.factors(A, B)
    e, r, k = A.stride()
    s = _rows(call, x, A, (e, k, r), R, 1.0)
    e, n, r = B.stride()
    adapter = Factor(s, B, e, r, n, R, scaling)
    return _product(call, x, transposed, adapter, _bias(call, bias)), s


@flat
def grouped_lora_linear_4bit_backward(
    dy, x, s, w: WeightArgs, offsets, transposed, A, B, scaling, need_dx, need_dA, need_dB
):
    call = _Call(dy, w, offsets, transposed)
    M, E, N, K = call.M, call.E, call.N, call.K
    dy, x = call.unpack.matrix("dy", dy, M, N), call.unpack.matrix("x", x, M, K)
    R = call.factors(A, B)
    s = call.unpack.data("s", s.contiguous(), torch.float32, M * R).view(M, R)
    dx, dA = dy.new_empty(0), A.new_empty((E, R, K) if need_dA else 0)
    dB = B.new_empty((E, N, R) if need_dB else 0)
    if need_dx or need_dA:
        e, n, r = B.stride()
        ds = _rows(call, dy, B, (e, n, r), R, scaling)
    if need_dx:
        adapter = Factor(ds, A, *A.stride(), R, 1.0)
        dx = _product(call, dy, not transposed, adapter, None)
    if need_dA:
        e, r, k = dA.stride()
        _of_rows(call, dA, (e, k, r), x, ds, 1.0)
    if need_dB:
        _of_rows(call, dB, dB.stride(), dy, s, scaling)
    return dx, dA, dB
