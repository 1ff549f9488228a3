"""The differentiable functions of a column- and a row-parallel layer.

P processes share ``y = x Wᵀ + scaling · S Bᵀ + bias`` with ``S = dropout(x) Aᵀ``; index p marks the part of
process p, Σ an all-reduce. Adapters are cut as in S-LoRA (Sheng et al. 2023, section 6): what is communicated for
them is only as wide as their rank. S and dS are float32.

=====================  ======================================================================================
column-parallel        W, B and bias are cut by N, A by R
forward                ``S_p = dropout(x) A_pᵀ``;  S by all-gather, [M, R]
                       ``y_p = x W_pᵀ + scaling S B_pᵀ + bias_p``
backward               ``dS = Σ_p scaling dy_p B_p``, [M, R];  dS_p its own columns
                       ``dA_p = dS_pᵀ dropout(x)``;  ``dB_p = scaling dy_pᵀ S``;  ``dbias_p = Σ_m dy_p``
                       ``dx = Σ_p (dy_p W_p + mask (dS_p A_p))``, [M, K]
row-parallel           x, W and A are cut by K, B by N
forward                ``S = Σ_p dropout(x)_p A_pᵀ``, [M, R]
                       ``y = Σ_p (x_p W_pᵀ + [scaling S B_pᵀ in the columns of p] + [bias if p = 0])``, [M, N]
backward               ``dS = Σ_p scaling dy[:, p] B_p``, [M, R]
                       ``dA_p = dSᵀ dropout(x)_p``;  ``dB_p = scaling dy[:, p]ᵀ S``;  ``dbias = Σ_m dy``
                       ``dx_p = dy W_p + mask_p (dS A_p)``
=====================  ======================================================================================

The dropout mask is that of one process: the seed is the first process's, and of a row-parallel layer every process
makes the mask of the columns before its own too.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from ..functional import bias_gradient, differentiable_once
from ..schema import ops
from .shards import Cut, Place


def _shrink(x, A, dropout_p, seed, first=0):
    """``dropout(x) Aᵀ``, float32 [M, R], of columns that begin at ``first`` of the layer's: the S of a layer
    without outputs."""
    if A.shape[0] == 0:  # fewer ranks than processes
        return x.new_zeros(x.shape[0], 0, dtype=torch.float32)
    if seed is not None and first:
        x, A = pad(x, (first, 0)), pad(A, (first, 0))
    nothing = x.new_empty(0, x.shape[1]), A, A.new_empty(0, A.shape[0])
    return ops.lora_linear(x, *nothing, 1.0, None, dropout_p, seed)[1]


def _shrink_backward(ds, x, A, dropout_p, seed, need_dx, need_dA, first=0):
    """``mask (dS A)`` float32 and ``dSᵀ dropout(x)``: the gradients of a layer with W = 0, B = 1 and dy = dS."""
    if A.shape[0] == 0:
        return 0.0, torch.zeros_like(A)
    columns = x.shape[1]
    x = x.float()
    if seed is not None and first:
        x, A = pad(x, (first, 0)), pad(A, (first, 0))
    zero, one = ds.new_zeros(A.shape), torch.eye(A.shape[0], device=A.device)
    dx, dA, _, _ = ops.lora_linear_backward(
        ds, x, ds, zero, A, one, 1.0, None, dropout_p, seed, need_dx, need_dA, False, False
    )
    return dx[..., -columns:], dA[..., -columns:].contiguous()


def _expand_(y, s, B, scaling):
    """``y += scaling S Bᵀ``, the sum in float32 and rounded into y."""
    y.add_(s @ B.float().T, alpha=scaling)


def _without_autocast(function):
    """Skinny products stay float32; x was cast before."""

    def run(ctx, *args):
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        with torch.autocast(device.type, enabled=False):
            return function(ctx, *args)

    return run


class ColumnParallel(torch.autograd.Function):
    """``x [M, K]``, the same on all processes, to the own columns ``[M, N_p]``. A is None: without adapter."""

    @staticmethod
    @_without_autocast
    def forward(ctx, x, A, B, bias, seed, place: Place, ranks: Cut, scaling, dropout_p, *weight):
        y, s = ops.linear_4bit(x, *weight, bias), None
        if A is not None:
            s = place.all_gather(_shrink(x, A, dropout_p, seed), ranks)
            _expand_(y, s, B, scaling)
        ctx.save_for_backward(None if A is None else x, A, B, bias, seed, s, *weight[:6])
        ctx.rest = place, ranks, scaling, dropout_p, weight[6:]
        return y

    @staticmethod
    @differentiable_once
    @_without_autocast
    def backward(ctx, saved, dy):
        x, A, B, bias, seed, s, *weight = saved
        place, ranks, scaling, dropout_p, dims = ctx.rest
        need_dx, need_dA, need_dB, need_dbias = ctx.needs_input_grad[:4]
        dx = ops.linear_4bit_dx(dy, *weight, *dims) if need_dx else None
        dA = dB = None
        if A is not None and (need_dx or need_dA):
            ds = place.all_reduce(scaling * (dy.float() @ B.float()))
            ds = ranks.own(ds, 1).contiguous()
            of_adapter, dA = _shrink_backward(ds, x, A, dropout_p, seed, need_dx, need_dA)
            dx = dx.add_(of_adapter) if need_dx else None
        if need_dB:
            dB = (scaling * (dy.float().T @ s)).to(B.dtype)
        if need_dx:
            place.all_reduce(dx)
        dbias = bias_gradient(dy, bias.dtype) if need_dbias else None
        return dx, dA if need_dA else None, dB, dbias, *([None] * 14)


class RowParallel(torch.autograd.Function):
    """The own columns ``x_p [M, K_p]`` to ``y [M, N]``, the same on all processes. A is None: without adapter."""

    @staticmethod
    @_without_autocast
    def forward(
        ctx, x, A, B, bias, seed, place: Place, cuts: tuple[Cut, Cut], scaling, dropout_p, *weight
    ):
        inputs, outputs = cuts
        y, s = ops.linear_4bit(x, *weight, bias if place.rank == 0 else None), None
        if A is not None:
            s = place.all_reduce(_shrink(x, A, dropout_p, seed, inputs.first))
            _expand_(outputs.own(y, 1), s, B, scaling)
        place.all_reduce(y)
        ctx.save_for_backward(None if A is None else x, A, B, bias, seed, s, *weight[:6])
        ctx.rest = place, cuts, scaling, dropout_p, weight[6:]
        return y

    @staticmethod
    @differentiable_once
    @_without_autocast
    def backward(ctx, saved, dy):
        x, A, B, bias, seed, s, *weight = saved
        place, (inputs, outputs), scaling, dropout_p, dims = ctx.rest
        need_dx, need_dA, need_dB, need_dbias = ctx.needs_input_grad[:4]
        dx = ops.linear_4bit_dx(dy, *weight, *dims) if need_dx else None
        dA = dB = None
        if A is not None and (need_dx or need_dA):
            own = outputs.own(dy, 1).float()
            ds = place.all_reduce(scaling * (own @ B.float()))
            of_adapter, dA = _shrink_backward(
                ds, x, A, dropout_p, seed, need_dx, need_dA, inputs.first
            )
            dx = dx.add_(of_adapter) if need_dx else None
        if need_dB:
            dB = (scaling * (outputs.own(dy, 1).float().T @ s)).to(B.dtype)
        dbias = bias_gradient(dy, bias.dtype) if need_dbias else None
        return dx, dA if need_dA else None, dB, dbias, *([None] * 14)
