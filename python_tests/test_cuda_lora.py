"""S, dS, dA, dB and dbias of 16-bit activations on tensor cores: sizes on each side of the kernels' tiles.

The kernels take tiles of 32 rows x 256 columns and 16 ranks a pass.
"""

import itertools

import pytest
import torch

import cases
import conftest
import tolerance
from emulator import thread_order
from lowrank_kernels.schema import ops

KERNELS = [k for k in conftest.KERNELS if k == "emulator"]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FACTORS = {
    "M": (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300),
    "NK": ((8, 8), (8, 264), (64, 72), (72, 64), (264, 1000), (1000, 8), (256, 264), (72, 520)),
    "dtype": (BF16, F16),
    "R": (1, 8, 12, 15, 16, 20, 31, 32, 64, 100),
    "adapter": (F32, BF16, F16),
    "bias": (None, F32, BF16, F16),
    "scaling": (2.0, -0.25),
    "dropout_p": (0.0, 0.25),
}
CASES = [cases._case(row) for row in cases.pairwise(FACTORS)]
CASES += [cases.Case(17, 72, 264, dtype=t, R=256, adapter=F32, dropout_p=0.1) for t in (BF16, F16)]
# More than one strip, range of rows and pass; a bias that is a pass of its own; one of each only.
FEW = [
    cases.Case(129, 264, 520, dtype=BF16, R=20, adapter=F32, bias=F32, dropout_p=0.25),
    cases.Case(65, 72, 264, dtype=F16, R=16, adapter=BF16, bias=F16, dropout_p=0.0),
    cases.Case(33, 264, 64, dtype=BF16, R=8, adapter=BF16, bias=BF16, dropout_p=0.5),
]


@pytest.fixture(params=KERNELS, autouse=True)
def backend(request):
    with conftest.entered(request.param) as name:
        yield name


def problem(case):
    """Arguments of lora_linear and of lora_linear_backward; the base is one that costs little time."""
    x, weight, *rest = cases.make("lora_linear", case)
    dy = cases.random_tensor(case.M, case.N, dtype=case.dtype)
    s = cases.random_tensor(case.M, case.R, dtype=F32)
    return (x, weight, *rest), (dy, x, s, weight, *rest)


def gradients(args, dx=False, dA=True, dB=True, dbias=True):
    return ops.lora_linear_backward(*args, dx, dA, dB, dbias)


def check_gradients(args, outputs, c=tolerance.C_ZERO_MEAN):
    values, magnitudes = tolerance.evaluate("lora_linear_backward", (*args, *[True] * 4))
    for name, actual, value, magnitude in list(
        zip(["dx", "dA", "dB", "dbias"], outputs, values, magnitudes, strict=True)
    )[1:]:
        tolerance.assert_close(name, actual, value, magnitude, c)


@pytest.mark.parametrize("case", CASES)
def test_products(case):
    forward, backward = problem(case)
    _, s = ops.lora_linear(*forward)
    values, magnitudes = tolerance.evaluate("lora_linear", forward)
    tolerance.assert_close("S", s, values[1], magnitudes[1])
    check_gradients(backward, gradients(backward))


@pytest.mark.parametrize("case", FEW)
def test_each_gradient_alone(case):
    _, args = problem(case)
    full = gradients(args)
    for needs in itertools.product((False, True), repeat=3):
        for need, actual, expected in zip(needs, gradients(args, False, *needs)[1:], full[1:]):
            if need:
                tolerance.assert_same_bits(f"needs {needs}", actual, expected)


@pytest.mark.parametrize("case", FEW)
def test_the_order_of_threads_does_not_show(case):
    forward, backward = problem(case)
    expected = (ops.lora_linear(*forward)[1], *gradients(backward))
    for kind, seed in ((1, 0), (2, 1), (2, 2)):
        with thread_order(kind, seed):
            actual = (ops.lora_linear(*forward)[1], *gradients(backward))
        tolerance.assert_same_bits(f"order {kind}, {seed}", actual, expected)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("N", [72, 264, 1000])
def test_ds(dtype, N):
    """With M = 1 and x = 1, every column of dA is dS."""
    _, args = problem(cases.Case(1, N, 8, dtype=dtype, R=20, scaling=0.5))
    dy, x, s, weight, A, B, scaling, *rest = args
    dA = gradients((dy, torch.ones_like(x), s, weight, A, B, scaling, *rest), False, True, False)[1]
    value = scaling * dy.double() @ B.double()
    magnitude = abs(scaling) * dy.double().abs() @ B.double().abs()
    for k in range(8):
        tolerance.assert_close("dS", dA[:, k][None], value, magnitude)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("adapter", [F32, F16])
def test_rows_alone_and_in_a_batch(dtype, adapter):
    """The bits of a row of S and dS do not depend on the other rows; dx of zeros as base shows dS."""
    case = cases.Case(130, 264, 520, dtype=dtype, R=20, adapter=adapter)
    forward, backward = problem(case)
    x, weight, *rest = forward
    dy, _, s, *_ = backward
    weight = torch.zeros_like(weight)
    whole = ops.lora_linear(x, weight, *rest)[1]
    dx = ops.lora_linear_backward(dy, x, s, weight, *rest, True, False, False, False)[0]
    for rows in (slice(0, 1), slice(37, 38), slice(3, 70), slice(129, 130)):
        part = ops.lora_linear(x[rows], weight, *rest)[1]
        tolerance.assert_same_bits("S", part, whole[rows])
        args = (dy[rows], x[rows], s[rows], weight, *rest)
        part = ops.lora_linear_backward(*args, True, False, False, False)[0]
        tolerance.assert_same_bits("dx", part, dx[rows])


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("adapter", [F32, BF16])
def test_row_strides(dtype, adapter):
    """Columns of a wider matrix, for every operand that may be one."""
    case = cases.Case(40, 72, 64, dtype=dtype, R=12, adapter=adapter, bias=F32)
    _, args = problem(case)
    expected = gradients(args)

    def wider(t, extra):
        wide = torch.full((t.shape[0], t.shape[1] + extra), torch.nan, dtype=t.dtype)
        wide[:, : t.shape[1]] = t
        return wide[:, : t.shape[1]]

    dy, x, s, weight, A, B, *rest = args
    args = (wider(dy, 8), wider(x, 16), s, weight, wider(A, 3), wider(B, 5), *rest)
    tolerance.assert_same_bits("gradients", gradients(args), expected)
    expected = ops.lora_linear(x, weight, A, B, *rest)[1]
    actual = ops.lora_linear(wider(x, 8), weight, wider(A, 1), B, *rest)[1]
    tolerance.assert_same_bits("S", actual, expected)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("which", ["dy", "x", "S", "A", "B"])
def test_infinities_and_nans_spread_as_in_ieee(dtype, value, which):
    """Parts of an operand must not make a NaN of an infinity, nor spoil neighbours."""
    case = cases.Case(34, 40, 72, dtype=dtype, R=12, bias=F32)
    forward, backward = problem(case)
    if which in ("x", "A"):
        args = list(forward)
        args[{"x": 0, "A": 2}[which]][1, -1] = value
        s = ops.lora_linear(*args)[1]
        values, magnitudes = tolerance.evaluate("lora_linear", tuple(args))
        tolerance.assert_close("S", s, values[1], magnitudes[1])
    if which != "A":
        args = list(backward)
        args[{"dy": 0, "x": 1, "S": 2, "B": 5}[which]][1, -1] = value
        check_gradients(tuple(args), gradients(args))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_dropped_elements_are_gone(dtype):
    """Even those that are no numbers."""
    case = cases.Case(33, 16, 264, dtype=dtype, R=8, dropout_p=0.5)
    forward, backward = problem(case)
    x, *rest = forward
    clean = ops.lora_linear(*forward)[1]
    kept = tolerance.reference.dropout_mask(case.M, case.K, case.dropout_p, rest[-1]) != 0
    spoiled = torch.where(kept, x, torch.tensor(torch.nan, dtype=dtype))
    tolerance.assert_same_bits("S", ops.lora_linear(spoiled, *rest)[1], clean)
    dy, _, *others = backward
    tolerance.assert_same_bits(
        "gradients", gradients((dy, spoiled, *others)), gradients((dy, x, *others))
    )


@pytest.mark.parametrize("R", [12, 16])
def test_no_rows_give_zero_gradients(R):
    forward, backward = problem(cases.Case(0, 72, 264, dtype=BF16, R=R, bias=F16, dropout_p=0.5))
    assert ops.lora_linear(*forward)[1].shape == (0, R)
    # Whatever freed memory holds must not show.
    del [torch.full((72, 264), torch.nan) for _ in range(8)][:]
    for gradient in gradients(backward)[1:]:
        assert gradient.numel() and not gradient.count_nonzero()


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_values_of_every_size(dtype):
    case = cases.Case(34, 40, 72, dtype=dtype, R=12, bias=F32)
    _, backward = problem(case)
    args = list(backward)
    for i, size in ((0, 3), (1, 3), (2, 9), (4, 9), (5, 9)):
        args[i] = args[i] * 10.0 ** torch.randint(-size, size, args[i].shape)
        args[i] = args[i].to(backward[i].dtype)
    check_gradients(args, gradients(args), tolerance.c_worst_case(case.N + case.M))
