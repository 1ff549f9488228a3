"""dS = scaling dy B, dx = dy W + mask (dS A), dA = dSᵀ dropout(x), dB = scaling dyᵀ S, dbias = Σ dy.

What does not depend on the base is tested here for both; test_lora_linear_backward.py has the dense base.
"""

import itertools

import pytest
import torch

import cases
import edges
import tolerance
from conftest import each_case
from lowrank_kernels import functional, reference
from lowrank_kernels.schema import ops

FORWARD = ["lora_linear_4bit", "lora_linear"]
BACKWARD = [f"{op}_backward" for op in FORWARD]
OP = BACKWARD[0]
# M = 3 runs on gemv, M = 6 on skinny or gemm; K = 130 has blocks that cross rows.
EXTREME = [cases.Case(M, 21, K, "nf4", 64, R=12) for M in (3, 6) for K in (128, 130)]


@each_case(cases.LARGE, cases.SHARED, edges.linear)
def test_backward(case, backend):
    outputs = tolerance.problem(OP, case).check()
    expected = [case.dtype, case.adapter, case.adapter, case.bias or case.dtype]
    assert [o.dtype for o in outputs] == expected


@pytest.mark.parametrize("op", BACKWARD)
@pytest.mark.parametrize("case", [cases.FEW[1], cases.FEW[2]])
def test_only_what_is_needed(op, case, backend):
    """All 16 choices: a gradient has the bits it has among all four, or no elements."""
    args = cases.make(op, case)
    everything = getattr(ops, op)(*args[:-4], True, True, True, True)
    for needs in itertools.product((False, True), repeat=4):
        outputs = getattr(ops, op)(*args[:-4], *needs)
        for need, output, full in zip(needs, outputs, everything):
            expected = full if need else full.new_empty(0)
            tolerance.assert_same_bits(f"{op}, needs {needs}", output, expected)


@pytest.mark.parametrize("op", BACKWARD)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_no_rows_give_zero_gradients(op, dropout_p, backend):
    case = cases.Case(0, 33, 96, bias=cases.BF16, adapter=cases.F16, dropout_p=dropout_p)
    args = cases.make(op, case)
    # Whatever freed memory holds must not show.
    del [torch.full((33, 96), torch.nan) for _ in range(8)][:]
    dx, dA, dB, dbias = getattr(ops, op)(*args)
    assert dx.shape == (0, 96)
    for gradient in (dA, dB, dbias):
        assert gradient.numel() and not gradient.count_nonzero()


@pytest.mark.parametrize("op", BACKWARD)
def test_the_mask_is_the_one_of_forward(op, backend, subtests):
    """With W = 0, dx is zero exactly where forward dropped; dA sees x only where it was kept."""
    for M, p in itertools.product((1, 3, 6, 70), (0.25, 0.9)):
        with subtests.test(M=M, p=p):
            check_mask(op, M, p)


def check_mask(op, M, p):
    case = cases.Case(M, 16, 128, dropout_p=p, R=3)
    args = list(cases.make(op, case))
    if op == OP:
        args[4] = torch.zeros_like(args[4])  # absmax
    else:
        args[3] = torch.zeros_like(args[3])
    dx, dA, _, _ = getattr(ops, op)(*args)
    kept = reference.dropout_mask(M, case.K, p, args[-5]) != 0
    assert torch.equal(dx != 0, kept)
    never = ~kept.any(0)
    assert torch.equal((dA != 0).any(0), ~never) and (M > 1 or never.any())


@pytest.mark.parametrize("op", FORWARD)
@pytest.mark.parametrize("case", cases.FEW)
def test_autograd(op, case, backend):
    """The public function's gradients against the reference, whose own S takes the place of the kernel's.

    The kernel's S differs by its float32 sums; the magnitude of dB has the S of absolute values for that.
    """
    case = case._replace(bias=case.bias or cases.F32)
    args = list(cases.make(op, case))
    x, A, B, bias = (args[i].requires_grad_() for i in (0, -6, -5, -3))
    torch.manual_seed(11)
    seed = functional.dropout_seed(case.dropout_p, torch.device("cpu"))
    torch.manual_seed(11)
    y = cases.call(op, tuple(args), case)
    args = (*(a.detach() if isinstance(a, torch.Tensor) else a for a in args[:-1]), seed)
    values, magnitudes = tolerance.evaluate(op, args)
    rounding = tolerance.operand_rounding(args[0], magnitudes[0])
    tolerance.assert_close("y", y, values[0], magnitudes[0], extra=rounding)

    dy = torch.randn(y.shape).to(y.dtype)
    y.backward(dy)
    needs = (True, True, True, True)
    expected, _ = tolerance.evaluate(f"{op}_backward", (dy, args[0], values[1], *args[1:], *needs))
    _, bounds = tolerance.evaluate(
        f"{op}_backward", (dy, args[0], magnitudes[1], *args[1:], *needs)
    )
    for name, tensor, value, bound in zip(
        ["x", "A", "B", "bias"], (x, A, B, bias), expected, bounds
    ):
        assert tensor.grad.dtype == tensor.dtype
        rounding = tolerance.operand_rounding(dy, bound) if name == "x" else 0.0
        tolerance.assert_close(f"gradient of {name}", tensor.grad, value, bound, extra=rounding)


@pytest.mark.parametrize("op", FORWARD)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_formulas_are_the_derivatives(op, dropout_p):
    """The reference backward against torch's autograd of the reference forward, both float64."""
    args = list(cases.make(op, cases.Case(bias=cases.F32, dropout_p=dropout_p)))
    x, A, B, bias = (args[i].double() for i in (0, -6, -5, -3))
    leaves = [t.clone().requires_grad_() for t in (x, A, B, bias)]
    args[0], args[-6], args[-5], args[-3] = leaves
    y, s = getattr(reference, op)(*args)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, leaves, dy)
    with torch.no_grad():
        actual = getattr(reference, f"{op}_backward")(dy, args[0], s, *args[1:], *[True] * 4)
    for a, e in zip(actual, expected):
        assert torch.allclose(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", FORWARD)
def test_needs_input_grad(op, backend):
    """Only the gradients that are asked for come, with the bits they have when all are."""
    case = cases.Case(bias=cases.F32, dropout_p=0.25)
    args = cases.make(op, case)

    def gradients(needs):
        tensors = [args[i].clone().requires_grad_(n) for i, n in zip((0, -6, -5, -3), needs)]
        x, A, B, bias = tensors
        torch.manual_seed(1)
        cases.call(op, (x, *args[1:-6], A, B, args[-4], bias, *args[-2:]), case).sum().backward()
        return [t.grad for t in tensors]

    everything = gradients((True,) * 4)
    for needs in list(itertools.product((False, True), repeat=4))[1:]:
        for need, actual, full in zip(needs, gradients(needs), everything):
            if need:
                tolerance.assert_same_bits(f"{op}, needs {needs}", actual, full)
            else:
                assert actual is None, f"{op}, needs {needs}"


@pytest.mark.parametrize("case", EXTREME)
def test_values_of_every_size(case, backend):
    args = list(cases.make(OP, case))
    for i in (0, 1, 2, 12, 13):
        args[i] = args[i] * 10.0 ** torch.randint(-5, 5, args[i].shape)
    c = tolerance.c_worst_case(case.N + case.R)
    tolerance.check(OP, tuple(args), ops.lora_linear_4bit_backward(*args), c)


@pytest.mark.parametrize("case", EXTREME)
def test_positive_terms(case, backend):
    args = cases.make(OP, case)
    args = tuple(
        a.abs() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    )
    c = tolerance.c_worst_case(case.N + case.R + case.M)
    tolerance.check(OP, args, ops.lora_linear_4bit_backward(*args), c)


@pytest.mark.parametrize("case", EXTREME)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_infinities_and_nans_spread_as_in_ieee(case, which, backend, subtests):
    """In dy, x and S; each shows in the gradients whose formulas have it, and in no other."""
    args = cases.make(OP, case._replace(bias=cases.F32))
    for value in (torch.inf, -torch.inf, torch.nan):
        with subtests.test(value=value):
            args[which][1, -1] = value
            dx, dA, dB, dbias = outputs = ops.lora_linear_4bit_backward(*args)
            tolerance.check(OP, args, outputs)
            clean = {
                0: [dx[0], dB[0], dbias[0]],
                1: [dx, dB, dbias, dA[:, 0]],
                2: [dx, dA, dbias, dB[:, 0]],
            }
            assert all(t.isfinite().all() for t in clean[which])
            spoiled = {0: [dx[1], dA, dB[-1], dbias[-1]], 1: [dA[:, -1]], 2: [dB[:, -1]]}
            assert not any(t.isfinite().any() for t in spoiled[which])


@pytest.mark.parametrize("op", FORWARD)
def test_a_sum_as_loss(op, backend):
    """Its gradient is one element with strides of 0, in any leading shape."""
    case = cases.Case(6, bias=cases.F32)
    args = list(cases.make(op, case))
    results = []
    for loss in (lambda y: y.sum(), lambda y: (y * torch.ones_like(y)).sum()):
        x, A = args[0].clone().requires_grad_(), args[-6].clone().requires_grad_()
        y = cases.call(op, (x.view(2, 3, -1), *args[1:-6], A, *args[-5:]), case)
        loss(y).backward()
        results.append((x.grad, A.grad))
    tolerance.assert_same_bits("gradients", *results)
