"""Every operator in plain PyTorch, float64 inside: the oracle of the tests and the ``reference`` backend.

Readable, never clever. Each function takes its operator's flat arguments and returns unrounded float64
(dequantize: the exact float32 products), so that a test can bound the rounding of a kernel. No function writes
to its arguments: one whose operator does (a name that ends in ``_``) returns what that argument becomes first.
"""

from __future__ import annotations

import functools

import torch

from .arguments import (
    NESTED_BLOCKSIZE,
    PagesArgs,
    PlanArgs,
    WeightArgs,
    ceil_div,
    each_given,
    each_pages,
    each_weight,
    flat,
    given,
    s_width,
)


def midpoint_nearest(values: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """Index of the entry of ``code`` nearest to each value; a value on a midpoint takes the lower entry."""
    order = torch.argsort(code, stable=True)
    midpoints = (code[order][:-1] + code[order][1:]) / 2
    return order[torch.bucketize(values, midpoints)].to(torch.uint8)


def _quantize_blocks(values, code, blocksize):
    """float32 flat values -> (index of the nearest code per element, absmax per block)."""
    numel = values.numel()
    padded = torch.nn.functional.pad(values, (0, -numel % blocksize)).view(-1, blocksize)
    absmax = padded.abs().amax(1)
    scaled = (padded * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    return midpoint_nearest(scaled.flatten()[:numel], code), absmax


def quantize_4bit(weight, code, blocksize):
    """absmax_b = max |w| in block b; nibble_i = nearest code to w_i / absmax_b."""
    nibbles, absmax = _quantize_blocks(weight.flatten().float(), code, blocksize)
    nibbles = torch.nn.functional.pad(nibbles, (0, nibbles.numel() % 2), value=_zero_nibble(code))
    return ((nibbles[::2] << 4) | nibbles[1::2])[:, None], absmax


def _zero_nibble(code):
    """What the pad nibble of an odd-sized tensor holds: the code of the value 0."""
    return int(midpoint_nearest(torch.zeros(1, device=code.device), code))


def double_quantize(absmax, nested_code):
    """offset = mean(absmax); absmax - offset in blocks of 256 to the nearest entry of ``nested_code``."""
    offset = absmax.double().mean().float() if absmax.numel() else absmax.new_zeros(())
    quantized, nested_absmax = _quantize_blocks(absmax - offset, nested_code, NESTED_BLOCKSIZE)
    return quantized, nested_absmax, offset


def block_scales(absmax, nested_absmax, nested_code, nested_offset):
    """The float32 scale of each block: product, then sum, each rounded."""
    if nested_absmax is None:
        return absmax
    nested = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()]
    return nested_code[absmax.long()] * nested + nested_offset


@flat
def dequantize_4bit(w: WeightArgs, dtype=None):
    """W[n, k] = code[nibble_i] * scale[i // blocksize] in float32, i = n*K + k; dtype is applied outside."""
    numel = w.N * w.K
    data = w.packed.contiguous().view(torch.uint8).flatten()[: ceil_div(numel, 2)]
    nibbles = torch.stack((data >> 4, data & 15), 1).flatten()[:numel]
    scales = block_scales(w.absmax, w.nested_absmax, w.nested_code, w.nested_offset)
    weight = w.code[nibbles.long()] * scales.repeat_interleave(w.blocksize)[:numel]
    return weight.view(w.N, w.K)


@flat
def linear_4bit(x, w: WeightArgs, bias):
    """y = x Wᵀ + bias."""
    y = x.double() @ dequantize_4bit(*w).double().T
    return y if bias is None else y + bias.double()


@flat
def linear_4bit_dx(dy, w: WeightArgs):
    """dx = dy W."""
    return dy.double() @ dequantize_4bit(*w).double()


def philox_4x32(counter: list[torch.Tensor], key: list[int]) -> list[torch.Tensor]:
    """Philox4x32-10 (Salmon et al., SC11) on int64 tensors that hold unsigned 32-bit words."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wrap-around keeps all 64 bits
        c0, c1, c2, c3 = (
            (p1 >> 32 & mask) ^ c1 ^ k0,
            p1 & mask,
            (p0 >> 32 & mask) ^ c3 ^ k1,
            p0 & mask,
        )
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [c0, c1, c2, c3]


def dropout_mask(M: int, K: int, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """[M, K] float64: 1/(1-p) where kept, 0 where dropped.

    Element (m, k) is kept when word ``k % 4`` of Philox4x32-10 with counter ``(k // 4, m low, m high, 0)``
    and key ``(seed low, seed high)`` is at least ``floor(p * 2**32)``.
    """
    if dropout_p == 0.0:
        return torch.ones(M, K, dtype=torch.float64)
    key = int(seed) & 0xFFFFFFFFFFFFFFFF
    m = torch.arange(M)[:, None].expand(M, (K + 3) // 4)
    k = torch.arange((K + 3) // 4)[None, :].expand_as(m)
    words = philox_4x32(
        [k, m & 0xFFFFFFFF, m >> 32, torch.zeros_like(k)], [key & 0xFFFFFFFF, key >> 32]
    )
    keep = torch.stack(words, -1).flatten(1)[:, :K] >= int(dropout_p * 2**32)
    return (keep.double() / (1.0 - dropout_p)).to(seed.device)


def lora_linear(x, weight, A, B, scaling, bias, dropout_p, seed):
    """S = dropout(x) Aᵀ;  y = x Wᵀ + scaling S Bᵀ + bias."""
    x, weight, A, B = (t.double() for t in (x, weight, A, B))
    s = (x * dropout_mask(*x.shape, dropout_p, seed).to(x.device)) @ A.T
    y = x @ weight.T + scaling * (s @ B.T)
    return (y if bias is None else y + bias.double()), s


def lora_linear_backward(
    dy, x, s, weight, A, B, scaling, bias, dropout_p, seed, need_dx, need_dA, need_dB, need_dbias
):
    """dS = scaling dy B;  dx = dy W + mask (dS A);  dA = dSᵀ dropout(x);  dB = scaling dyᵀ S;  dbias = Σ dy."""
    dy, x, s, weight, A, B = (t.double() for t in (dy, x, s, weight, A, B))
    mask = dropout_mask(*x.shape, dropout_p, seed).to(x.device)
    ds = scaling * (dy @ B)
    none = dy.new_empty(0)
    return (
        dy @ weight + mask * (ds @ A) if need_dx else none,
        ds.T @ (x * mask) if need_dA else none,
        scaling * (dy.T @ s) if need_dB else none,
        dy.sum(0) if need_dbias else none,
    )


@flat
def lora_linear_4bit(x, w: WeightArgs, A, B, scaling, bias, dropout_p, seed):
    """:func:`lora_linear` on the dequantized weight."""
    return lora_linear(x, dequantize_4bit(*w), A, B, scaling, bias, dropout_p, seed)


@flat
def lora_linear_4bit_backward(
    dy, x, s, w: WeightArgs, A, B, scaling, bias, dropout_p, seed,
    need_dx, need_dA, need_dB, need_dbias,
):  # fmt: skip
    """:func:`lora_linear_backward` on the dequantized weight."""
    return lora_linear_backward(
        dy, x, s, dequantize_4bit(*w), A, B, scaling, bias, dropout_p, seed,
        need_dx, need_dA, need_dB, need_dbias,
    )  # fmt: skip


# -- many adapters in one batch ------------------------------------------------------------------------------


class _Adapter:
    """The adapter of one row: A and B (transposed) float64 ``[rank, K]``, ``[rank, N]``; its mask ``[K]``."""

    def __init__(self, m: int, x: torch.Tensor, plan: PlanArgs, pages: PagesArgs):
        self.slot, _row0, _rows, page0 = plan.tiles[plan.tile_of_row[m]].tolist()
        self.rank = int(pages.ranks[self.slot])
        self.scaling = pages.scalings[self.slot].double()
        page_rank = pages.A_pages.shape[1]
        ids = plan.page_ids[page0 : page0 + ceil_div(self.rank, page_rank)].long()
        self.A = pages.A_pages[ids].flatten(0, 1)[: self.rank].double()
        self.B = pages.B_pages[ids].flatten(0, 1)[: self.rank].double()
        dropout_p = 0.0 if pages.seed is None else float(pages.dropout_p[self.slot])
        self.mask = _mask_row(m, x.shape[1], dropout_p, pages.seed).to(x.device)


@functools.lru_cache(maxsize=4)
def _masks(M: int, K: int, dropout_p: float, seed: int) -> torch.Tensor:
    return dropout_mask(M, K, dropout_p, torch.tensor([seed]))


def _mask_row(m: int, K: int, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
    if dropout_p == 0.0:
        return torch.ones(K, dtype=torch.float64)
    rows = 1 << m.bit_length()  # one table serves the rows of a batch
    return _masks(rows, K, dropout_p, int(seed))[m]


def _adapters_of_rows(x: torch.Tensor, plan: PlanArgs, pages: PagesArgs):
    """(row, adapter) of every row that has one; what ``tiles`` and ``rows`` say besides is not looked at."""
    for m, tile in enumerate(plan.tile_of_row.tolist()):
        if tile >= 0:
            yield m, _Adapter(m, x, plan, pages)


@flat
def multi_lora_(y, x, plan: PlanArgs, pages: PagesArgs):
    """y[m] + scaling S[m] Bᵀ with S[m] = dropout(x[m]) Aᵀ, row by row, each with its own adapter; and S."""
    x = x.double()
    y = y.double().clone()
    s = x.new_zeros(x.shape[0], s_width(plan))
    for m, adapter in _adapters_of_rows(x, plan, pages):
        s[m, : adapter.rank] = (x[m] * adapter.mask) @ adapter.A.T
        y[m] += adapter.scaling * (s[m, : adapter.rank] @ adapter.B)
    return y, s


@flat
def multi_lora_backward(dy, x, s, plan: PlanArgs, pages: PagesArgs, grad_rows, grad_rank, need_dx):
    """dS = scaling dy B;  dx = mask (dS A);  dA[u] = Σ dSᵀ dropout(x), dB[u]ᵀ = scaling Σ Sᵀ dy over rows of u."""
    dy, x, s = dy.double(), x.double(), s.double()
    dx = x.new_zeros(x.shape if need_dx else 0)
    dA, dB = x.new_zeros(grad_rank, x.shape[1]), x.new_zeros(grad_rank, dy.shape[1])
    for m, adapter in _adapters_of_rows(x, plan, pages):
        ds = adapter.scaling * (dy[m] @ adapter.B.T)
        if need_dx:
            dx[m] = adapter.mask * (ds @ adapter.A)
        if (first := int(grad_rows[adapter.slot])) >= 0:
            rows = slice(first, first + adapter.rank)
            dA[rows] += torch.outer(ds, x[m] * adapter.mask)
            dB[rows] += adapter.scaling * torch.outer(s[m, : adapter.rank], dy[m])
    return dx, dA, dB


@flat
def multi_lora_linear(x, weight, plan: PlanArgs, pages: PagesArgs, bias):
    """x Wᵀ + bias plus the rows' adapters, and S; on a dense weight (the operator has a 4-bit one)."""
    y = x.double() @ weight.double().T
    return multi_lora_(y if bias is None else y + bias.double(), x, *plan, *pages)


@flat
def multi_lora_linear_backward(
    dy, x, s, weight, plan: PlanArgs, pages: PagesArgs, bias,
    grad_rows, grad_rank, need_dx, need_dbias,
):  # fmt: skip
    """The gradients of :func:`multi_lora_linear`: those of :func:`multi_lora_backward`, dy W, Σ dy."""
    dx, dA, dB = multi_lora_backward(dy, x, s, *plan, *pages, grad_rows, grad_rank, need_dx)
    if need_dx:
        dx = dx + dy.double() @ weight.double()
    return dx, dA, dB, dy.double().sum(0) if need_dbias else dx.new_empty(0)


@flat
def multi_lora_linear_4bit(x, w: WeightArgs, plan: PlanArgs, pages: PagesArgs, bias):
    """:func:`multi_lora_linear` on the dequantized weight."""
    return multi_lora_linear(x, dequantize_4bit(*w), *plan, *pages, bias)


@flat
def multi_lora_linear_4bit_backward(
    dy, x, s, w: WeightArgs, plan: PlanArgs, pages: PagesArgs, bias,
    grad_rows, grad_rank, need_dx, need_dbias,
):  # fmt: skip
    """:func:`multi_lora_linear_backward` on the dequantized weight."""
    return multi_lora_linear_backward(
        dy, x, s, dequantize_4bit(*w), *plan, *pages, bias,
        grad_rows, grad_rank, need_dx, need_dbias,
    )  # fmt: skip


# -- several weights, one x ----------------------------------------------------------------------------------


def _each_lora(count: int, A, B, scaling, bias, dropout_p, seed) -> list[tuple]:
    """A, B, scaling, bias, dropout_p and seed of each weight; A is None where it has no adapter."""
    A, B, bias, seed = (each_given(tensors, count) for tensors in (A, B, bias, seed))
    none = [None] * count
    return list(zip(A, B, scaling or none, bias, dropout_p or none, seed, strict=True))


def lora_linear_4bit_group(x, weights, dims, *loras):
    """:func:`lora_linear_4bit` of each weight, or :func:`linear_4bit` of one without an adapter, whose S is [M, 0]."""
    ys, ss, group = [], [], each_weight(weights, dims)
    for w, adapter in zip(group, _each_lora(len(group), *loras)):
        if adapter[0] is None:
            y, s = linear_4bit(x, *w, adapter[3]), x.double().new_empty((x.shape[0], 0))
        else:
            y, s = lora_linear_4bit(x, *w, *adapter)
        ys.append(y)
        ss.append(s)
    return ys, ss


def lora_linear_4bit_group_backward(
    dy, x, s, weights, dims, A, B, scaling, bias, dropout_p, seed,
    need_dx, need_dA, need_dB, need_dbias,
):  # fmt: skip
    """The gradients of each weight that has a dy, see :func:`lora_linear_4bit_backward`; dx is the sum of theirs."""
    parts, group = [], each_weight(weights, dims)
    for i, adapter in enumerate(_each_lora(len(group), A, B, scaling, bias, dropout_p, seed)):
        none = s[i].double().new_empty(0)
        if given(dy[i]) is None:
            parts.append(None)
        elif adapter[0] is None:
            dx = linear_4bit_dx(dy[i], *group[i]) if need_dx else none
            parts.append((dx, none, none, dy[i].double().sum(0) if need_dbias[i] else none))
        else:
            needs = need_dx, need_dA[i], need_dB[i], need_dbias[i]
            of = *group[i], *adapter, *needs
            parts.append(lora_linear_4bit_backward(dy[i], x, s[i], *of))
    return _sum_of_parts(parts)


def _sum_of_parts(parts: list[tuple[torch.Tensor, ...] | None]):
    """dx = Σ dx of each, and lists of the other gradients; empty ones for a weight without a dy."""
    some = [part for part in parts if part is not None]
    none = some[0][0].new_empty(0)
    dx = functools.reduce(torch.add, [part[0] for part in some])
    return dx, *([none if part is None else part[i] for part in parts] for i in (1, 2, 3))


@flat
def multi_lora_linear_4bit_group(x, weights, dims, plan: PlanArgs, pages, seed, bias):
    """:func:`multi_lora_linear_4bit` of each weight."""
    biases = each_given(bias, len(dims) // 3)
    of_weight = zip(each_weight(weights, dims), each_pages(pages, seed), biases, strict=True)
    outputs = [multi_lora_linear_4bit(x, *w, *plan, *own, b) for w, own, b in of_weight]
    return tuple([output[i] for output in outputs] for i in (0, 1))


@flat
def multi_lora_linear_4bit_group_backward(
    dy, x, s, weights, dims, plan: PlanArgs, pages, seed, bias,
    grad_rows, grad_rank, need_dx, need_dbias,
):  # fmt: skip
    """The gradients of each weight that has a dy, see :func:`multi_lora_linear_4bit_backward`; dx is their sum."""
    biases = each_given(bias, len(dims) // 3)
    of_weight = zip(each_weight(weights, dims), each_pages(pages, seed), biases, strict=True)
    return _sum_of_parts([
        None if given(dy[i]) is None else multi_lora_linear_4bit_backward(
            dy[i], x, s[i], *w, *plan, *own, b, grad_rows[i], grad_rank[i], need_dx, need_dbias[i],
        )
        for i, (w, own, b) in enumerate(of_weight)
    ])  # fmt: skip


# -- stacked experts -----------------------------------------------------------------------------------------


def _each_expert(w: WeightArgs, offsets: torch.Tensor, transposed: bool):
    """(e, rows, W [N, K]) of every expert that has rows."""
    experts = offsets.numel()
    stack = dequantize_4bit(*w).double().view(experts, w.N // experts, w.K)
    start = 0
    for e, end in enumerate(offsets.tolist()):
        if end > start:
            yield e, slice(start, end), stack[e].T if transposed else stack[e]
        start = end


def _out_features(w: WeightArgs, offsets: torch.Tensor, transposed: bool) -> int:
    return w.K if transposed else w.N // offsets.numel()


@flat
def grouped_linear_4bit(x, w: WeightArgs, offsets, transposed, bias):
    """y[m] = W_e x[m] + bias_e for the rows of each expert e; zero for rows of none."""
    x = x.double()
    y = x.new_zeros(x.shape[0], _out_features(w, offsets, transposed))
    for e, rows, W in _each_expert(w, offsets, transposed):
        y[rows] = x[rows] @ W.T
        if bias is not None:
            y[rows] += bias[e].double()
    return y


@flat
def grouped_lora_linear_4bit(x, w: WeightArgs, offsets, transposed, A, B, scaling, bias):
    """:func:`grouped_linear_4bit` + scaling B_e S[m] with S[m] = A_e x[m]; and S, zero for rows of no expert."""
    y = grouped_linear_4bit(x, *w, offsets, transposed, bias)
    s = y.new_zeros(x.shape[0], A.shape[1])
    for e, rows, _ in _each_expert(w, offsets, transposed):
        s[rows] = x[rows].double() @ A[e].double().T
        y[rows] += scaling * (s[rows] @ B[e].double().T)
    return y, s


@flat
def grouped_lora_linear_4bit_backward(
    dy, x, s, w: WeightArgs, offsets, transposed, A, B, scaling, need_dx, need_dA, need_dB
):
    """dS = scaling dy B_e, dx = dy W_e + dS A_e, dA_e = dSᵀ x, dB_e = scaling dyᵀ S, over the rows of each expert."""
    dy, x, s, A, B = (t.double() for t in (dy, x, s, A, B))
    dx, dA, dB = x.new_zeros(x.shape), torch.zeros_like(A), torch.zeros_like(B)
    for e, rows, W in _each_expert(w, offsets, transposed):
        ds = scaling * (dy[rows] @ B[e])
        dx[rows] = dy[rows] @ W + ds @ A[e]
        dA[e], dB[e] = ds.T @ x[rows], scaling * (dy[rows].T @ s[rows])
    needs = need_dx, need_dA, need_dB
    return tuple(g if need else x.new_empty(0) for g, need in zip((dx, dA, dB), needs))
