"""multi_lora_linear_4bit_backward: all gradients of base and adapters; more in test_multi_lora_backward.py."""

import pytest
import torch

import cases
import edges
import lowrank_kernels as lk
import tolerance
from cases import BF16, F32, Case
from conftest import each_case
from test_multi_lora_ import EVERYWHERE, SOME
from test_multi_lora_linear_4bit import WHOLE

OP = "multi_lora_linear_4bit_backward"
ops = lk.schema.ops


@each_case(EVERYWHERE, [*SOME, *WHOLE], edges.many_adapters)
def test_bound(case, backend):
    tolerance.problem(OP, case).check()


@pytest.mark.parametrize(
    "case", [Case(40, 33, 128, R=9), Case(40, 33, 128, R=9, dtype=BF16, dropout_p=0.3)]
)
def test_two_adapters_together_have_the_gradients_of_each_alone(case, backend):
    """The rows of one adapter, with the others' rows made base-only: its gradients keep their bits."""
    plan, pages = cases.multi_args(case, [0, 1, 0, 1], [9, 11, 12, 8])
    dy, x = (cases.random_tensor(40, n, dtype=case.dtype) for n in (33, 128))
    w, s = cases.random_weight(case).op_args(), torch.randn(40, -(-plan[-1] // 8) * 8)
    ranks = pages[2].tolist()
    grads = torch.tensor([0, ranks[0], -1, -1, -1, -1], dtype=torch.int32), ranks[0] + ranks[1]
    together = ops.multi_lora_linear_4bit_backward(
        dy, x, s, *w, *plan, *pages, None, *grads, True, False
    )
    ids = {u: [int(i) for i in plan[1][int(t[3]) :]][: -(-max(1, ranks[u]) // pages[0].shape[1])]
           for u in (0, 1) for t in plan[0] if int(t[0]) == u}  # fmt: skip
    for slot, names in ((0, [0, -1, 0, -1]), (1, [-1, 1, -1, 1])):
        alone = cases.plan_args(names, [9, 11, 12, 8], ids, plan[-1])
        outputs = ops.multi_lora_linear_4bit_backward(
            dy, x, s, *w, *alone, *pages, None, *grads, True, False
        )
        mine = slice(0, ranks[0]) if slot == 0 else slice(ranks[0], ranks[0] + ranks[1])
        for got, expected in zip(outputs[1:3], together[1:3]):
            tolerance.assert_same_bits(f"adapter {slot}", got[mine], expected[mine])


def test_base_only_rows_have_the_gradient_of_the_base(backend):
    case = Case(30, 64, 128, "nf4", 64, True, R=8, bias=F32)
    plan, pages = cases.multi_args(case, [0, -1], [10, 20])
    dy, x, w = torch.randn(30, 64), torch.randn(30, 128), cases.random_weight(case).op_args()
    s = torch.zeros(30, -(-plan[-1] // 8) * 8)
    none = torch.full((cases.SLOTS,), -1, dtype=torch.int32), 0
    dx, _, _, dbias = ops.multi_lora_linear_4bit_backward(
        dy, x, s, *w, *plan, *pages, torch.zeros(64), *none, True, True
    )
    args = (dy, *w)
    expected = ops.linear_4bit_dx(*args)
    if backend in ("emulator", "cuda"):
        tolerance.check("linear_4bit_dx", (dy[10:], *w), dx[10:])
    else:
        tolerance.assert_same_bits("dx", dx[10:], expected[10:])
    sums, magnitudes = dy.double().sum(0), dy.double().abs().sum(0)
    tolerance.assert_close("dbias", dbias, sums, magnitudes)
