"""Every CUDA kernel on the emulator: results may not depend on which thread of a block goes first."""

from __future__ import annotations

import pytest

import cases
import conftest
import tolerance
from emulator import ORDERS, thread_order
from lowrank_kernels.schema import OPS, ops

pytestmark = pytest.mark.skipif(
    "emulator" not in conftest.KERNELS, reason="LOWRANK_BACKEND or LOWRANK_TEST_DEVICE is set"
)


# One of each kernel family at the edges of its tiles, in both 16-bit types.
CASES = [
    *cases.FEW,
    cases.Case(1, 33, 256, "nf4", 64, True, cases.BF16, cases.F32, 8, dropout_p=0.25),
    cases.Case(7, 64, 512, "fp4", 128, False, cases.F16, None, 12, cases.F16),
    cases.Case(17, 48, 320, "nf4", 64, True, cases.F16, cases.BF16, 1),
    cases.Case(70, 130, 128, "nf4", 64, True, cases.BF16, cases.F32, 64, cases.BF16, dropout_p=0.5),
    cases.Case(300, 24, 64, "nf4", 32, False, cases.BF16, None, 16),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", CASES)
def test_order_of_the_threads_does_not_matter(op, case):
    args = cases.make(op, case)
    with conftest.entered("emulator"):
        expected = None
        for name, order in ORDERS.items():
            with thread_order(*order):
                outputs = getattr(ops, op)(*args)
            expected = outputs if expected is None else expected
            tolerance.assert_same_bits(f"{op}, {name}", outputs, expected)


# -- what only large problems do -------------------------------------------------------------------


@pytest.mark.parametrize("op", ["linear_4bit", "linear_4bit_dx"])
def test_weight_that_is_dequantized_in_several_pieces(op):
    """Many rows go to the dense product, and a weight of this width does not fit into one piece (32 MiB)."""
    case = cases.Case(65, 260, 2**17, "nf4", 4096, bias=cases.F32)
    args = cases.make(op, case)
    with conftest.entered("emulator"):
        tolerance.check(op, args, getattr(ops, op)(*args))
