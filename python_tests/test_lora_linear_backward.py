"""Gradients of lora_linear, the dense base. The adapter's part: test_lora_linear_4bit_backward.py, for both."""

import pytest
import torch

import cases
import edges
import lowrank_kernels as lk
import tolerance
from conftest import each_case
from lowrank_kernels.schema import ops

OP = "lora_linear_backward"


@each_case(cases.LARGE, cases.SHARED, edges.linear)
def test_backward(case, backend):
    outputs = tolerance.problem(OP, case).check()
    expected = [case.dtype, case.adapter, case.adapter, case.bias or case.dtype]
    assert [o.dtype for o in outputs] == expected


@pytest.mark.parametrize("x", cases.FACTORS["dtype"])
@pytest.mark.parametrize("weight", cases.FACTORS["dtype"])
def test_every_mixture_of_dtypes(x, weight, backend, subtests):
    for adapter in cases.FACTORS["dtype"]:
        with subtests.test(adapter=adapter):
            case = cases.Case(9, 20, 70, dtype=x, adapter=adapter, bias=weight)
            args = list(cases.make(OP, case))
            args[3] = args[3].to(weight)
            tolerance.check(OP, tuple(args), ops.lora_linear_backward(*args))


@pytest.mark.parametrize("M", [1, 3, 6])
def test_values_of_every_size(M, backend):
    args = list(cases.make(OP, cases.Case(M, 21, 130, R=12)))
    for i in (0, 1, 2, 3, 4, 5):
        args[i] = args[i] * 10.0 ** torch.randint(-5, 5, args[i].shape)
    c = tolerance.c_worst_case(130 + 12)
    tolerance.check(OP, tuple(args), ops.lora_linear_backward(*args), c)


@pytest.mark.parametrize("dtype", cases.FACTORS["dtype"])
@pytest.mark.parametrize("needs_x", [False, True])
def test_gradient_of_the_weight(dtype, needs_x, backend):
    """A base that is trained as well: dW = dyᵀ x, in its dtype, and dx as without it."""
    case = cases.Case(9, dtype=dtype, bias=cases.F32)
    x, weight, A, B, scaling, bias, *_ = cases.make("lora_linear", case)
    x.requires_grad_(needs_x)
    weight.requires_grad_()
    A.requires_grad_()
    y = lk.lora_linear(x, weight, A, B, scaling, bias)
    dy = torch.randn(y.shape).to(dtype)
    y.backward(dy)
    assert weight.grad.dtype == dtype and weight.grad.is_contiguous()
    value = dy.double().T @ x.detach().double()
    magnitude = dy.double().abs().T @ x.detach().double().abs()
    # torch's matmul of this dtype does it, which on a CPU sums bfloat16 and float16 in float32.
    tolerance.assert_close("dW", weight.grad, value, magnitude)
    assert (x.grad is not None) == needs_x
    if needs_x:
        args = (
            dy,
            x.detach(),
            torch.zeros(9, case.R),
            weight.detach(),
            A.detach(),
            B,
            scaling,
            bias,
        )
        expected = ops.lora_linear_backward(*args, 0.0, None, True, False, False, False)[0]
        tolerance.assert_same_bits("dx", x.grad, expected)


def test_frozen_weight_gets_no_gradient(backend):
    x, weight, A, B, scaling, bias, *_ = cases.make("lora_linear", cases.Case())
    A.requires_grad_()
    lk.lora_linear(x, weight, A, B, scaling, bias).sum().backward()
    assert A.grad is not None and weight.grad is None and x.grad is None and B.grad is None
