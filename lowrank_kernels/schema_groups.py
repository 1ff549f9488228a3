"""The operators of several weights that share x: schema string and fake, as schema.py has those of one weight."""

from __future__ import annotations

import torch

from .arguments import (
    PAGES_TENSORS,
    PlanArgs,
    each_given,
    each_pages,
    expect,
    expect_bias,
    expect_group,
    expect_length,
    expect_lora,
    expect_matrix,
    expect_numel,
    expect_pages,
    expect_plan,
    expect_shape,
    given,
    s_width,
)
from .operators import OPS, PLAN, operator

__all__ = ["OPS"]

# Lists have an entry for each weight, but for `weights` (six tensors each, as in WeightArgs), `dims` (N, K, blocksize)
# and `pages` (five tensors, as in PagesArgs, whose seed is apart). Shape [0] stands for None; an empty list of biases,
# of seeds, or of all that adapters have (A, B, scaling, dropout_p), for None of each weight.
GROUP = "Tensor[] weights, int[] dims"
LORAS = "Tensor[] A, Tensor[] B, float[] scaling"
DROPOUTS = "float[] dropout_p, Tensor[] seed"

# Of a group y, s, dA, dB and dbias are lists. S of a weight without an adapter is [M, 0]. A weight without a dy has no
# part in dx, and its gradients are empty.


def _expect_loras(group, A, B, scaling, dropout_p, seed) -> list[tuple | None]:
    """A and B of each weight; None where it has no adapter. Checks the lists."""
    count = len(group) if len(A) else 0
    for name, values in {"A": A, "B": B, "scaling": scaling, "dropout_p": dropout_p}.items():
        expect_length(name, values, count)
    expect_length("seed", seed, count, or_none=True)
    adapters = [None] * len(group)
    for i, (a, b, key) in enumerate(zip(*(each_given(of, count) for of in (A, B, seed)))):
        expect((a is None) == (b is None), "B", "shape [0] where A has it, and nowhere else")
        if a is not None:
            expect_lora(a, b, group[i].N, group[i].K, dropout_p[i], key, f"[{i}]")
            adapters[i] = a, b
    return adapters


def _expect_biases(group, bias) -> None:
    expect_length("bias", bias, len(group), or_none=True)
    for i, (w, b) in enumerate(zip(group, each_given(bias, len(group)))):
        expect_bias(b, w.N, f"[{i}]")


def _expect_dys(group, dy) -> torch.Tensor:
    """One of them, of which the others have the dtype and the number of rows."""
    expect_length("dy", dy, len(group))
    some = [(i, t) for i, t in enumerate(dy) if given(t) is not None]
    expect(len(some) > 0, "dy", "a tensor for one weight at least, got none")
    M, _ = expect_matrix("dy", some[0][1])
    for i, t in some:
        expect_shape(f"dy[{i}]", t, M, group[i].N, dtypes=(some[0][1].dtype,))
    return some[0][1]


def _group_gradients(group, dy, like_A, like_B, bias, need_dx, need_dbias):
    """dx, dA, dB, dbias; ``like_A``, ``like_B``: an empty tensor of each dA and dB."""
    dy, bias = each_given(dy, 0), each_given(bias, len(group))
    first = next(t for t in dy if t is not None)
    nothing = [t.new_empty(0) for t in like_A], [t.new_empty(0) for t in like_B]
    dA, dB = (
        [none if t is None else full for t, none, full in zip(dy, *of)]
        for of in zip(nothing, (like_A, like_B))
    )
    dbias = [
        (first if b is None else b).new_empty(w.N if need and t is not None else 0)
        for w, b, need, t in zip(group, bias, need_dbias, dy)
    ]
    return first.new_empty((first.shape[0], group[0].K) if need_dx else 0), dA, dB, dbias


@operator(
    f"(Tensor x, {GROUP}, {LORAS}, Tensor[] bias, {DROPOUTS}) -> (Tensor[], Tensor[])",
)
def _lora_linear_4bit_group(x, weights, dims, A, B, scaling, bias, dropout_p, seed):
    M, _ = expect_matrix("x", x)
    group = expect_group(weights, dims)
    expect_shape("x", x, M, group[0].K)
    adapters = _expect_loras(group, A, B, scaling, dropout_p, seed)
    _expect_biases(group, bias)
    ranks = [0 if of is None else of[0].shape[0] for of in adapters]
    return (
        [x.new_empty((M, w.N)) for w in group],
        [x.new_empty((M, rank), dtype=torch.float32) for rank in ranks],
    )


@operator(
    f"(Tensor[] dy, Tensor? x, Tensor[] s, {GROUP}, {LORAS}, Tensor[] bias, {DROPOUTS}, bool need_dx, "
    "bool[] need_dA, bool[] need_dB, bool[] need_dbias) -> (Tensor, Tensor[], Tensor[], Tensor[])"
)
def _lora_linear_4bit_group_backward(
    dy, x, s, weights, dims, A, B, scaling, bias, dropout_p, seed,
    need_dx, need_dA, need_dB, need_dbias,
):  # fmt: skip
    group = expect_group(weights, dims)
    first = _expect_dys(group, dy)
    adapters = _expect_loras(group, A, B, scaling, dropout_p, seed)
    _expect_biases(group, bias)
    expect_length("s", s, len(group))
    for name, needs in (("need_dA", need_dA), ("need_dB", need_dB), ("need_dbias", need_dbias)):
        expect_length(name, needs, len(group))
    M = first.shape[0]
    if x is not None:
        expect_shape("x", x, M, group[0].K)
    like_A, like_B = [], []
    for i, of in enumerate(adapters):
        if of is not None and given(dy[i]) is not None:
            expect(x is not None, "x", "a tensor where there is an adapter, got None")
            expect_numel(f"s[{i}]", s[i], torch.float32, M * of[0].shape[0])
        a, b = of or (first.new_empty(0), first.new_empty(0))
        like_A.append(a.new_empty(a.shape if need_dA[i] else 0))
        like_B.append(b.new_empty(b.shape if need_dB[i] else 0))
    return _group_gradients(group, dy, like_A, like_B, bias, need_dx, need_dbias)


def _multi_group(x, weights, dims, plan, pages, seed, bias):
    """The weights, after the checks of all that both operators take."""
    M, K = expect_matrix("x", x)
    group = expect_group(weights, dims)
    expect_shape("x", x, M, group[0].K)
    expect_plan(plan, M)
    expect_length("pages", pages, PAGES_TENSORS * len(group))
    expect_length("seed", seed, len(group), or_none=True)
    for i, (w, of) in enumerate(zip(group, each_pages(pages, seed))):
        expect_pages(of, w.N, K, f"[{i}]")
    _expect_biases(group, bias)
    return group


@operator(
    f"(Tensor x, {GROUP}, {PLAN}, Tensor[] pages, Tensor[] seed, Tensor[] bias) -> (Tensor[], Tensor[])"
)
def _multi_lora_linear_4bit_group(x, weights, dims, plan: PlanArgs, pages, seed, bias):
    group = _multi_group(x, weights, dims, plan, pages, seed, bias)
    M, width = x.shape[0], s_width(plan)
    return (
        [x.new_empty((M, w.N)) for w in group],
        [x.new_empty((M, width), dtype=torch.float32) for _ in group],
    )


@operator(
    f"(Tensor[] dy, Tensor x, Tensor[] s, {GROUP}, {PLAN}, Tensor[] pages, Tensor[] seed, Tensor[] bias, "
    "Tensor[] grad_rows, int[] grad_rank, bool need_dx, bool[] need_dbias)"
    " -> (Tensor, Tensor[], Tensor[], Tensor[])"
)
def _multi_lora_linear_4bit_group_backward(
    dy, x, s, weights, dims, plan: PlanArgs, pages, seed, bias,
    grad_rows, grad_rank, need_dx, need_dbias,
):  # fmt: skip
    group = _multi_group(x, weights, dims, plan, pages, seed, bias)
    first = _expect_dys(group, dy)
    M, K = x.shape
    expect_shape("dy", first, M, first.shape[1])
    lists = {"s": s, "grad_rows": grad_rows, "grad_rank": grad_rank, "need_dbias": need_dbias}
    for name, values in lists.items():
        expect_length(name, values, len(group))
    like_A, like_B = [], []
    for i, of in enumerate(each_pages(pages, seed)):
        expect_numel(f"s[{i}]", s[i], torch.float32, M * s_width(plan))
        expect_numel(f"grad_rows[{i}]", grad_rows[i], torch.int32, of.ranks.numel())
        expect(grad_rank[i] >= 0, f"grad_rank[{i}]", "at least 0, got {}", grad_rank[i])
        like_A.append(first.new_empty((grad_rank[i], K), dtype=torch.float32))
        like_B.append(first.new_empty((grad_rank[i], group[i].N), dtype=torch.float32))
    return _group_gradients(group, dy, like_A, like_B, bias, need_dx, need_dbias)
