"""multi_lora_linear_4bit_group: several weights that share x; the numbers of the single operators, and their bits."""

import pytest

import cases
import tolerance
from cases import BF16, F16, F32, Case
from conftest import each_case
from test_multi_lora_ import EVERYWHERE, SOME

OP = "multi_lora_linear_4bit_group"


@each_case(EVERYWHERE, SOME)
def test_bound(case, backend):
    tolerance.problem(OP, case).check()


@pytest.mark.parametrize(
    "case",
    [
        Case(M, 48, 256, "nf4", 64, True, dtype, bias, 8, dropout_p=p)
        for M, dtype, bias, p in ((1, F32, F32, 0.0), (3, BF16, None, 0.3), (20, F16, F16, 0.1))
    ],
)
def test_bits_of_the_single_operators(case, backend):
    args = cases.make(OP, case)
    outputs = cases.run(OP, args)
    for i, (op, of) in enumerate(cases.of_each_weight(OP, args)):
        y, *s = cases.run(op, of)
        tolerance.assert_same_bits(f"y of weight {i}", outputs[i], y)
        for expected in s:
            tolerance.assert_same_bits(f"S of weight {i}", outputs[3 + i], expected)


def test_no_rows(backend):
    outputs = cases.run(OP, cases.make(OP, Case(0, 33, 96)))
    assert [tuple(t.shape) for t in outputs[:3]] == [(0, 33), (0, 11), (0, 36)]
