"""multi_lora_linear_4bit: base and adapters in one operator, one rounding; more in test_multi_lora_.py."""

import pytest
import torch

import cases
import edges
import lowrank_kernels as lk
import tolerance
from cases import BF16, F16, F32, Case
from conftest import each_case
from test_multi_lora_ import EVERYWHERE, SOME

OP = "multi_lora_linear_4bit"
ops = lk.schema.ops
WHOLE = [
    Case(M, 33, 256, "nf4", 64, True, dtype, bias, R)
    for M, R in ((1, 16), (3, 4), (4, 100), (6, 8), (33, 20), (130, 12))
    for dtype, bias in ((F32, F32), (BF16, None), (F16, BF16))
]


@each_case(EVERYWHERE, [*SOME, *WHOLE], edges.many_adapters)
def test_bound(case, backend):
    tolerance.problem(OP, case).check()


@pytest.mark.parametrize(
    "case", [Case(3, 33, 256, "nf4", 64, True, R=8), Case(40, 70, 128, R=8, dtype=BF16)]
)
def test_rows_without_adapter_are_the_base_bit_for_bit(case, backend):
    if backend in ("emulator", "cuda"):
        pytest.skip("on a GPU adapters may choose another order of the base's sum")
    half = case.M // 2
    plan, pages = cases.multi_args(case, [0, -1], [half, case.M - half])
    x, w = (
        cases.random_tensor(case.M, case.K, dtype=case.dtype),
        cases.random_weight(case).op_args(),
    )
    y, _ = ops.multi_lora_linear_4bit(x, *w, *plan, *pages, None)
    tolerance.assert_same_bits("base", y[half:], ops.linear_4bit(x, *w, None)[half:])


def test_one_adapter_for_all_rows_is_lora_linear_4bit(backend):
    case = Case(20, 48, 128, "nf4", 64, True, R=12, bias=F32)
    plan, pages = cases.multi_args(case, [3], [20])
    A_pages, B_pages, ranks, scalings, *_ = pages
    rank = int(ranks[3])
    ids = plan[1][: -(-rank // A_pages.shape[1])].long()
    A, B = (p[ids].flatten(0, 1)[:rank] for p in (A_pages, B_pages))
    x, w, bias = torch.randn(20, 128), cases.random_weight(case).op_args(), torch.randn(48)
    y, _ = ops.multi_lora_linear_4bit(x, *w, *plan, *pages, bias)
    if rank:
        args = (x, *w, A, B.T, float(scalings[3]), bias, 0.0, None)
        tolerance.check("lora_linear_4bit", args, (y, ops.lora_linear_4bit(*args)[1]))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_one_rounding(dtype, backend):
    """Base and adapter that cancel: a sum of two rounded parts would show."""
    if backend in ("emulator", "cuda"):
        pytest.skip("operands are rounded to 16 bits there: its bound is in test_bound")
    case = Case(8, 64, 64, "nf4", 64, R=64, dtype=dtype)
    plan, pages = cases.multi_args(case, [1], [8])
    while int(pages[2][1]) < 8:
        plan, pages = cases.multi_args(case, [1], [8])
    w = cases.random_weight(case).op_args()
    x = cases.random_tensor(8, 64, dtype=dtype)
    y = ops.linear_4bit(x, *w, None)
    bias = -y[0].float()  # what is left of row 0 is the adapter and the rounding of the base
    args = (x, *w, *plan, *pages, bias)
    tolerance.check(OP, args, ops.multi_lora_linear_4bit(*args))
