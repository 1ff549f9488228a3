"""dx = dy W on a 4-bit weight."""

import pytest
import torch

import cases
import edges
import tolerance
from conftest import each_case
from lowrank_kernels.schema import ops

# M = 3 runs on gemv, M = 6 on skinny or gemm; K = 130 has blocks that cross rows.
EXTREME = [cases.Case(M, 21, K, "nf4", 64) for M in (3, 6) for K in (128, 130)]


@each_case(cases.LARGE, cases.SHARED, edges.linear)
def test_backward(case, backend):
    tolerance.problem("linear_4bit_dx", case).check()


@pytest.mark.parametrize("shape", [(0, 33, 64), (3, 0, 64), (3, 33, 0), (0, 0, 0)])
def test_empty_dimensions(shape, backend):
    M, N, K = shape
    args = cases.make("linear_4bit_dx", cases.Case(M, N, max(K, 1)))
    dx = ops.linear_4bit_dx(*args) if K else _no_columns(args[0], N)
    tolerance.assert_same_bits("dx", dx, torch.zeros(M, K))


def _no_columns(dy, N):
    empty = torch.zeros(0, dtype=torch.uint8)
    code = torch.zeros(16)
    return ops.linear_4bit_dx(dy, empty, torch.zeros(0), code, None, None, None, N, 0, 64)


@pytest.mark.parametrize("case", EXTREME)
def test_values_of_every_size(case, backend):
    dy, packed, absmax, *rest = cases.make("linear_4bit_dx", case)
    dy = dy * 10.0 ** torch.randint(-12, 12, dy.shape)
    args = (dy, packed, 10.0 ** torch.randint(-6, 6, absmax.shape), *rest)
    c = tolerance.c_worst_case(case.N)
    tolerance.check("linear_4bit_dx", args, ops.linear_4bit_dx(*args), c)


@pytest.mark.parametrize("case", EXTREME)
def test_scales_of_every_size(case, backend, subtests):
    dy, packed, absmax, *rest = cases.make("linear_4bit_dx", case)
    for scale in (1e30, 1e-30, 1e-44, 0.0, -1.0):
        with subtests.test(scale=scale):
            args = (dy, packed, torch.full_like(absmax, scale), *rest)
            tolerance.check("linear_4bit_dx", args, ops.linear_4bit_dx(*args))


@pytest.mark.parametrize("case", EXTREME)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinities_and_nans_of_dy_spread_as_in_ieee(case, value, backend, subtests):
    dy, *rest = cases.make("linear_4bit_dx", case)
    for column in (0, 3, -1):
        with subtests.test(column=column):
            args = dy.clone(), *rest
            args[0][1, column] = value
            dx = ops.linear_4bit_dx(*args)
            tolerance.check("linear_4bit_dx", args, dx)
            assert not dx[1].isfinite().any()
            assert dx[0].isfinite().all() and dx[2].isfinite().all()


@pytest.mark.parametrize("case", cases.FEW)
def test_is_the_adjoint_of_linear_4bit(case, backend):
    """<x Wᵀ, dy> = <x, dy W>: the two operators decode the same weight."""
    dy, *weight = cases.make("linear_4bit_dx", case._replace(dtype=cases.F32))
    x = torch.randn(case.M, case.K)
    y = ops.linear_4bit(x, *weight, None)
    dx = ops.linear_4bit_dx(dy, *weight)
    left, right = (y.double() * dy.double()).sum(), (x.double() * dx.double()).sum()
    scale = (x.double().abs() @ torch.ones(case.K, 1).double()).sum() * dy.double().abs().sum()
    assert abs(left - right) <= 1e-6 * scale


@pytest.mark.large_memory(1)
@pytest.mark.parametrize("M", [1, 5])
def test_weight_of_more_than_2_31_elements(M, large_weight):
    """Only the last rows have scales, so they alone make dx. One second."""
    w, tail = large_weight
    dy = torch.randn(M, w.shape[0])
    dx = ops.linear_4bit_dx(dy, *w.op_args())
    rows = tail.shape[0]
    tolerance.check("linear_4bit_dx", (dy[:, -rows:], *tail.op_args()), dx)
    assert dx.count_nonzero() > dx.numel() // 2
