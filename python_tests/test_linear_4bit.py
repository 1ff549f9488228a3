"""y = x Wᵀ + bias on a 4-bit weight."""

import pytest
import torch

import cases
import edges
import lowrank_kernels as lk
import tolerance
from conftest import each_case
from lowrank_kernels import reference
from lowrank_kernels.schema import ops


@each_case(cases.LARGE, cases.SHARED, edges.linear)
def test_forward(case, backend):
    tolerance.problem("linear_4bit", case).check()


@pytest.mark.parametrize("shape", [(0, 33, 64), (3, 0, 64), (3, 33, 0), (0, 0, 0), (1, 1, 0)])
def test_empty_dimensions(shape, backend):
    M, N, K = shape
    bias = torch.randn(N)
    w = lk.quantize_4bit(torch.randn(N, K))
    y = lk.linear_4bit(torch.randn(M, K), w, bias)
    tolerance.assert_same_bits("y", y, bias.expand(M, N) if K == 0 else torch.empty(M, N))


# M = 3 runs on gemv, M = 6 on skinny or gemm; K = 130 has blocks that cross rows.
EXTREME = [cases.Case(M, 21, K, "nf4", 64) for M in (3, 6) for K in (128, 130)]


def with_scales(args, scales):
    """The arguments of linear_4bit with other absmax."""
    x, packed, absmax, *rest = args
    return x, packed, scales.expand(absmax.shape).contiguous(), *rest


@pytest.mark.parametrize("case", EXTREME)
def test_huge_tiny_and_negative_scales(case, backend, subtests):
    """1e-44 is subnormal: kernels must not flush to zero."""
    for scale in (1e30, 1e-30, 1e-38, -2.0, 1e-44):
        with subtests.test(scale=scale):
            args = with_scales(cases.make("linear_4bit", case), torch.tensor(scale))
            tolerance.check("linear_4bit", args, ops.linear_4bit(*args))


@pytest.mark.parametrize("case", EXTREME)
def test_zero_scales_give_the_bias(case, backend):
    case = case._replace(bias=cases.F32)
    args = with_scales(cases.make("linear_4bit", case), torch.tensor(0.0))
    y = ops.linear_4bit(*args)
    assert torch.equal(y, args[-1].expand_as(y))


@pytest.mark.parametrize("case", EXTREME)
def test_values_of_every_size(case, backend):
    """Activations over 24 decades, scales over 12: the worst-case bound, since a few terms are the sum."""
    x, packed, absmax, *rest = cases.make("linear_4bit", case)
    x = x * 10.0 ** torch.randint(-12, 12, x.shape)
    args = with_scales((x, packed, absmax, *rest), 10.0 ** torch.randint(-6, 6, absmax.shape))
    c = tolerance.c_worst_case(case.K)
    tolerance.check("linear_4bit", args, ops.linear_4bit(*args), c)


@pytest.mark.parametrize("case", EXTREME)
def test_positive_terms(case, backend):
    """All products of one sign: rounding errors of the sum have the most to grow on."""
    x, packed, absmax, code, *rest = cases.make("linear_4bit", case)
    args = x.abs(), packed, absmax, code.abs(), *rest
    tolerance.check("linear_4bit", args, ops.linear_4bit(*args), tolerance.c_worst_case(case.K))


@pytest.mark.parametrize("case", EXTREME)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinities_and_nans_of_x_spread_as_in_ieee(case, value, backend, subtests):
    """inf times the code 0 is NaN, times another code an infinity; other rows stay as they are."""
    x, *rest = cases.make("linear_4bit", case)
    for column in (0, 63, 64, 127, -1):
        with subtests.test(column=column):
            args = x.clone(), *rest
            args[0][1, column] = value
            y = ops.linear_4bit(*args)
            tolerance.check("linear_4bit", args, y)
            assert not y[1].isfinite().any()
            assert y[0].isfinite().all() and y[2].isfinite().all()


@pytest.mark.parametrize("case", EXTREME)
def test_overflow_of_float16_is_an_infinity(case, backend):
    args = cases.make("linear_4bit", case._replace(dtype=cases.F16))
    args = with_scales(args, torch.tensor(1e6))
    y = ops.linear_4bit(*args)
    tolerance.check("linear_4bit", args, y)
    assert y.isinf().any() and not y.isnan().any()


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_packed_bytes_of_any_dtype_and_orientation(storage, backend):
    args = cases.make("linear_4bit", cases.Case(3, 16, 64))
    expected = ops.linear_4bit(*args)
    for orientation in ((-1, 1), (1, -1), (-1,)):
        packed = args[1].flatten().view(storage).view(orientation)
        y = ops.linear_4bit(args[0], packed, *args[2:])
        tolerance.assert_same_bits(f"y, packed {orientation}", y, expected)


@pytest.mark.parametrize("case", cases.FEW)
def test_gradients(case, backend):
    """Autograd against the reference backward."""
    args = cases.make("linear_4bit", case._replace(bias=case.bias or cases.F32))
    x, bias = args[0].requires_grad_(), args[-1].requires_grad_()
    w = cases.weight_of(args[1:10], case)
    y = lk.linear_4bit(x, w, bias)
    tolerance.check("linear_4bit", args, y)
    dy = torch.randn(y.shape).to(y.dtype)
    y.backward(dy)
    assert (x.grad.dtype, bias.grad.dtype) == (x.dtype, bias.dtype)
    tolerance.check("linear_4bit_dx", (dy, *args[1:10]), x.grad)
    sums, magnitudes = dy.double().sum(0), dy.double().abs().sum(0)
    tolerance.assert_close("dbias", bias.grad, sums, magnitudes, tolerance.c_worst_case(case.M))


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_the_gradients_that_are_needed(needs, backend):
    args = cases.make("linear_4bit", cases.Case(bias=cases.BF16))
    x, bias = args[0].requires_grad_(needs[0]), args[-1].requires_grad_(needs[1])
    lk.linear_4bit(x, cases.weight_of(args[1:10], cases.Case()), bias).sum().backward()
    assert (x.grad is not None, bias.grad is not None) == needs


def test_reference_is_the_dense_product():
    """The reference itself, once against torch on a weight that is written out."""
    args = cases.make("linear_4bit", cases.Case(bias=cases.F32))
    dense = reference.dequantize_4bit(*args[1:10])
    expected = torch.nn.functional.linear(args[0].double(), dense.double(), args[-1].double())
    assert torch.allclose(reference.linear_4bit(*args), expected, rtol=1e-14, atol=0)


# -- more than 2^31 elements -----------------------------------------------------------------------


@pytest.mark.large_memory(1)
@pytest.mark.parametrize("M", [1, 5])
def test_weight_of_more_than_2_31_elements(M, large_weight):
    """64-bit indices near the end: all scales but the last rows' are zero. One second."""
    w, tail = large_weight
    x = torch.randn(M, w.shape[1])
    y = lk.linear_4bit(x, w)
    rows = tail.shape[0]
    assert w.shape.numel() > 2**31 and not y[:, :-rows].any()
    tolerance.check("linear_4bit", (x, *tail.op_args(), None), y[:, -rows:])


@pytest.mark.large_memory(5)
def test_output_of_more_than_2_31_elements():
    """Four seconds on two AVX-512 cores."""
    case = cases.Case(2**16 + 1, 2**15, 32, "nf4", 32, True, cases.BF16)
    args = cases.make("linear_4bit", case)
    y = ops.linear_4bit(*args)
    assert y.numel() > 2**31
    for rows in (slice(0, 4), slice(case.M - 4, case.M)):
        tolerance.check("linear_4bit", (args[0][rows], *args[1:]), y[rows])
