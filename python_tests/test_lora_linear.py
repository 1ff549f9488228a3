"""y = x Wᵀ + scaling S Bᵀ + bias on a dense weight. Dropout: test_lora_linear_4bit.py, for both."""

import pytest
import torch

import cases
import edges
import lowrank_kernels as lk
import tolerance
from conftest import each_case
from lowrank_kernels.schema import ops

OP = "lora_linear"


@each_case(cases.LARGE, cases.SHARED, edges.linear)
def test_forward(case, backend):
    y, s = tolerance.problem(OP, case).check()
    assert (y.dtype, s.dtype) == (case.dtype, torch.float32)


@pytest.mark.parametrize("x", cases.FACTORS["dtype"])
@pytest.mark.parametrize("weight", cases.FACTORS["dtype"])
def test_every_mixture_of_dtypes(x, weight, backend, subtests):
    for adapter in cases.FACTORS["dtype"]:
        with subtests.test(adapter=adapter):
            case = cases.Case(9, 20, 70, dtype=x, adapter=adapter, bias=weight)
            args = list(cases.make(OP, case))
            args[1] = args[1].to(weight)
            tolerance.check(OP, tuple(args), ops.lora_linear(*args))


@pytest.mark.parametrize("shape", [(0, 33, 64), (3, 0, 64), (3, 33, 0), (0, 0, 0)])
def test_empty_dimensions(shape, backend):
    M, N, K = shape
    bias = torch.randn(N)
    args = torch.randn(N, K), torch.randn(4, K), torch.randn(N, 4), 2.0, bias, 0.5
    y = lk.lora_linear(torch.randn(M, K), *args)
    tolerance.assert_same_bits("y", y, bias.expand(M, N) if K == 0 else torch.empty(M, N))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("which", ["x", "weight", "A", "B"])
def test_infinities_and_nans_spread_as_in_ieee(value, which, backend, subtests):
    for M in (1, 3, 8):
        with subtests.test(M=M):
            args = cases.make(OP, cases.Case(M, 21, 65, R=5))
            args[["x", "weight", "A", "B"].index(which)][0, -1] = value
            outputs = ops.lora_linear(*args)
            tolerance.check(OP, args, outputs)
            spoiled = {"x": 0, "weight": (..., 0), "A": ..., "B": (..., 0)}[which]
            assert not outputs[0][spoiled].isfinite().any()
            assert which in "xA" or outputs[0][..., 1:].isfinite().all()


@pytest.mark.parametrize("M", [1, 3, 6])
def test_values_of_every_size(M, backend):
    x, weight, A, B, *rest = cases.make(OP, cases.Case(M, 21, 130, R=12))
    tensors = [t * 10.0 ** torch.randint(-6, 6, t.shape) for t in (x, weight, A, B)]
    c = tolerance.c_worst_case(130 + 12)
    tolerance.check(OP, (*tensors, *rest), ops.lora_linear(*tensors, *rest), c)


@pytest.mark.parametrize("M", [1, 6])
def test_the_weight_may_be_a_view(M, backend):
    """A tied embedding, one expert of a stack, a merged projection: rows or columns of something larger."""
    args = cases.make(OP, cases.Case(M, 24, 40, R=4))
    stack = torch.randn(3, 24, 80)
    for view in (stack[1, :, :40], stack[2, :, 1::2], stack[0, :, 40:], stack[0].T[:40].T):
        expected = ops.lora_linear(args[0], view.contiguous(), *args[2:])
        tolerance.assert_same_bits("y", ops.lora_linear(args[0], view, *args[2:]), expected)
