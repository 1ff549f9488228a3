"""grouped_linear_4bit: each row of x meets one expert of a stack, transposed or not."""

import pytest
import torch

import cases
import conftest
import edges
import lowrank_kernels as lk
import tolerance
from cases import BF16, F16, F32, Case
from conftest import each_case
from lowrank_kernels.schema import ops

OP = "grouped_linear_4bit"
STACKS = [
    Case(40, 48, 256, "nf4", 64, True, BF16, BF16), Case(41, 48, 256, "nf4", 64, True, BF16),
    Case(30, 33, 130, "fp4", 32, False, F32, F32), Case(31, 33, 130, "fp4", 32, False, F16, F32),
]  # fmt: skip


def with_offsets(args, *offsets):
    return (*args[:10], torch.tensor(offsets, dtype=torch.int32), *args[11:])


def of_expert(args, e):
    """linear_4bit, or linear_4bit_dx of a transposed stack, on the rows of expert e: operator and arguments."""
    x, w = args[0], cases.weight_of(args[1:10], Case())
    offsets, transposed, bias = args[10].tolist(), args[11], args[12]
    rows = slice(offsets[e - 1] if e else 0, offsets[e])
    E, size = cases.EXPERTS, w.shape[0] // cases.EXPERTS
    stack = lk.quantize_4bit(torch.zeros(E, size, w.shape[1]), w.quant_type, w.blocksize, False)
    own = w.narrow(0, e * size, size)
    assert stack.shape[1:] == own.shape
    if transposed:
        return rows, "linear_4bit_dx", (x[rows], *own.op_args())
    return rows, "linear_4bit", (x[rows], *own.op_args(), None if bias is None else bias[e])


@each_case(cases.LARGE, cases.SHARED[::2], edges.linear)
def test_bound(case, backend):
    (y,) = tolerance.problem(OP, case).check()
    assert y.dtype == case.dtype


@pytest.mark.parametrize("case", STACKS)
@pytest.mark.parametrize(
    "offsets", [(0, 0, 0, 0), (7, 7, 7, 7), (0, 9, 9, 20), (1, 5, 22, 30), (0, 0, 0, 30), (30,) * 4]
)
def test_experts_with_any_number_of_rows(case, offsets, backend):
    args = with_offsets(cases.make(OP, case), *offsets)
    y = ops.grouped_linear_4bit(*args)
    tolerance.check(OP, args, y)
    assert not y[offsets[-1] :].any()  # of rows that belong to no expert


@pytest.mark.parametrize("case", STACKS[:2])
def test_rows_have_the_bits_of_their_expert_alone(case, backend):
    if backend in ("emulator", "cuda", "triton"):
        pytest.skip("the kernel of a single weight is another one there")
    args = with_offsets(cases.make(OP, case._replace(double_quant=False)), 1, 5, 30, 40)
    args = (*args[:12], None)
    y = ops.grouped_linear_4bit(*args)
    for e in range(cases.EXPERTS):
        rows, op, of = of_expert(args, e)
        tolerance.assert_same_bits(f"expert {e}", y[rows], getattr(ops, op)(*of))


def test_int8_activations(backend):
    """Rows are rounded as with their expert alone; there is no product of bytes of the other direction."""
    if not backend.startswith("cpu-") or lk.backends.report()["int8"] is None:
        pytest.skip("no products of int8 here")
    # the weight is the same matrix [E N, K] in both
    args = with_offsets(
        cases.make(OP, STACKS[0]._replace(K=256, N=256, double_quant=False)), 1, 5, 30, 40
    )
    natural, transposed = (*args[:11], False, None), (*args[:11], True, None)
    with lk.int8_activations():
        y = ops.grouped_linear_4bit(*natural)
        for e in range(cases.EXPERTS):
            rows, op, of = of_expert(natural, e)
            tolerance.assert_same_bits(f"expert {e}", y[rows], getattr(ops, op)(*of))
        with pytest.raises(RuntimeError, match="int8_activations: expected experts"):
            ops.grouped_linear_4bit(*transposed)
    assert not torch.equal(y, ops.grouped_linear_4bit(*natural))


@pytest.mark.parametrize("case", STACKS)
def test_a_row_has_the_same_bits_in_any_batch(case, backend):
    args = with_offsets(cases.make(OP, case), 6, 14, 14, 30)
    y = ops.grouped_linear_4bit(*args)
    fewer = with_offsets((args[0][6:30], *args[1:]), 0, 8, 8, 24)
    tolerance.assert_same_bits("y", ops.grouped_linear_4bit(*fewer), y[6:30])


@pytest.mark.skipif(
    conftest.ONLY_REFERENCE or conftest.ONLY_TRITON,
    reason="only the CPU kernels look at the offsets",
)
@pytest.mark.parametrize("offsets", [(3, 2, 4, 5), (0, 1, 2, 41), (-1, 0, 2, 5)])
def test_offsets_that_lead_out_of_x_are_refused(offsets):
    args = with_offsets(cases.make(OP, Case(40, 48, 256)), *offsets)
    with pytest.raises(RuntimeError, match="offsets: expected ascending numbers of rows up to 40"):
        ops.grouped_linear_4bit(*args)


def test_infinities_and_nans_stay_in_their_rows(backend):
    for case in STACKS[:3]:
        x, *rest = with_offsets(cases.make(OP, case), 2, 9, 20, 30)
        for value in (torch.inf, -torch.inf, torch.nan):
            args = x.clone(), *rest
            args[0][4, 3] = value
            y = ops.grouped_linear_4bit(*args)
            tolerance.check(OP, args, y)
            assert not y[4].isfinite().any() and y[:4].isfinite().all() and y[5:].isfinite().all()


def test_empty_sizes(backend):
    w = lk.quantize_4bit(torch.randn(3, 0, 64))
    offsets = torch.tensor([1, 1, 2], dtype=torch.int32)
    assert lk.grouped_linear_4bit(torch.randn(2, 64), w, offsets).shape == (2, 0)
    w, none = lk.quantize_4bit(torch.randn(3, 8, 64)), torch.zeros(3, dtype=torch.int32)
    assert lk.grouped_linear_4bit(torch.randn(0, 64), w, none).shape == (0, 8)
    bias = torch.randn(3, 8)
    w = lk.quantize_4bit(torch.randn(3, 8, 0))
    y = lk.grouped_linear_4bit(torch.randn(2, 0), w, offsets, bias)
    tolerance.assert_same_bits("y", y, bias[[0, 2]])
