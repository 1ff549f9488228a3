"""multi_lora_linear_4bit_group_backward: dx is the sum of the parts of all weights, rounded once."""

import pytest
import torch

import cases
import tolerance
from cases import BF16, F16, F32, Case
from conftest import each_case
from test_multi_lora_ import EVERYWHERE, SOME

OP = "multi_lora_linear_4bit_group_backward"


@each_case(EVERYWHERE, SOME)
def test_bound(case, backend):
    tolerance.problem(OP, case).check()


@pytest.mark.parametrize("M", [1, 7, 70])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_one_rounding_of_dx(M, dtype, backend):
    """Parts that nearly cancel: that each was rounded before their sum would show."""
    if backend in ("emulator", "cuda"):
        pytest.skip("operands are rounded to 16 bits there: its bound is in test_bound")
    args = list(cases.make(OP, Case(M, 48, 64, "nf4", 64, R=4, dtype=dtype)))
    weights, dims = args[3], args[4]
    args[0] = [args[0][0], args[0][0].neg(), torch.empty(0)]
    args[3] = [*weights[:6], *(t.clone() for t in weights[:6]), *weights[12:]]
    args[4] = [*dims[:3], *dims[:3], *dims[6:]]
    args[3][7] = args[3][7] * 1.001  # absmax: a weight that differs by a thousandth
    args[11] = [*args[11][:5], *args[11][:5], *args[11][10:]]
    args[13], args[-1] = [], [False] * 3
    for i in (14, 15):  # grad_rows and grad_rank of the same adapters
        args[i] = [args[i][0], args[i][0], args[i][2]]
    with torch.no_grad():
        tolerance.check(OP, tuple(args), cases.run(OP, tuple(args)))


@pytest.mark.parametrize(
    "case", [Case(5, 33, 96, bias=F32), Case(3, 40, 128, dtype=BF16, dropout_p=0.3)]
)
@pytest.mark.parametrize("without", [(0,), (1,), (0, 2)])
def test_weights_without_a_dy(case, without, backend):
    args = list(cases.make(OP, case))
    args[0] = [torch.empty(0) if i in without else t for i, t in enumerate(args[0])]
    outputs = cases.run(OP, tuple(args))
    tolerance.check(OP, tuple(args), outputs)
    for i in without:
        assert [outputs[1 + 3 * j + i].numel() for j in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("case", [Case(4, 33, 128, dropout_p=0.25), Case(20, 33, 96, dtype=BF16)])
def test_gradients_but_dx_have_the_bits_of_the_single_operators(case, backend):
    if backend in ("emulator", "cuda"):
        pytest.skip("with another dtype of dx other kernels run there: its bound is in test_bound")
    args = cases.make(OP, case)
    outputs = cases.run(OP, args)
    for i, (op, of) in enumerate(cases.of_each_weight(OP, args)):
        _, *gradients = cases.run(op, of)
        for j, expected in enumerate(gradients):
            tolerance.assert_same_bits(
                f"gradient {j} of weight {i}", outputs[1 + 3 * j + i], expected
            )
