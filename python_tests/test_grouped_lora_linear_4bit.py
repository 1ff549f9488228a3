"""grouped_lora_linear_4bit: each row of x meets one expert of a stack and that expert's adapter."""

import pytest
import torch

import cases
import edges
import lowrank_kernels as lk
import tolerance
from cases import BF16, F16, F32, Case
from conftest import each_case
from lowrank_kernels.schema import ops
from test_grouped_linear_4bit import with_offsets

OP = "grouped_lora_linear_4bit"
STACKS = [
    Case(40, 48, 256, "nf4", 64, True, BF16, BF16, 8), Case(41, 48, 256, "nf4", 64, True, BF16, None, 8),
    Case(30, 33, 130, "fp4", 32, False, F32, F32, 12, F16), Case(31, 33, 130, "fp4", 32, False, F16, F32, 12),
]  # fmt: skip


@each_case(cases.LARGE[:6], cases.SHARED[::2], edges.linear)
def test_bound(case, backend):
    y, s = tolerance.problem(OP, case).check()
    assert (y.dtype, s.dtype) == (case.dtype, torch.float32)


@pytest.mark.parametrize("case", STACKS)
@pytest.mark.parametrize("offsets", [(0, 0, 0, 0), (0, 9, 9, 20), (1, 5, 22, 30), (30,) * 4])
def test_experts_with_any_number_of_rows(case, offsets, backend):
    args = with_offsets(cases.make(OP, case), *offsets)
    y, s = ops.grouped_lora_linear_4bit(*args)
    tolerance.check(OP, args, (y, s))
    assert not y[offsets[-1] :].any() and not s[offsets[-1] :].any()


@pytest.mark.parametrize("case", STACKS)
def test_without_scaling_it_is_the_base(case, backend):
    args = cases.make(OP, case._replace(scaling=0.0))
    y, _ = ops.grouped_lora_linear_4bit(*args)
    base = ops.grouped_linear_4bit(*args[:12], args[15])
    assert torch.equal(y, base)


@pytest.mark.parametrize("case", STACKS)
def test_a_row_has_the_same_bits_in_any_batch(case, backend):
    args = with_offsets(cases.make(OP, case), 6, 14, 14, 30)
    y, s = ops.grouped_lora_linear_4bit(*args)
    fewer = with_offsets((args[0][6:30], *args[1:]), 0, 8, 8, 24)
    tolerance.assert_same_bits("y", ops.grouped_lora_linear_4bit(*fewer), (y[6:30], s[6:30]))


@pytest.mark.parametrize("shape", [(5, 33, 0), (5, 0, 64), (0, 33, 64), (0, 0, 0)])
@pytest.mark.parametrize("transposed", [False, True])
def test_empty_dimensions(shape, transposed, backend):
    """S is an output of its own: where its sums have no terms it is zero, not what lay in memory."""
    M, N, K = shape
    w = lk.quantize_4bit(torch.randn(3, K, N) if transposed else torch.randn(3, N, K))
    offsets, bias = torch.tensor([M // 2, M // 2, M], dtype=torch.int32), torch.randn(3, N)
    args = (offsets, transposed, torch.randn(3, 8, K), torch.randn(3, N, 8), 2.0, bias)
    for _ in range(8):  # what S may lie in next
        torch.full((M, 8), torch.nan)
    y, s = ops.grouped_lora_linear_4bit(torch.randn(M, K), *w.op_args(), *args)
    assert s.shape == (M, 8) and (K > 0 or not s.any())
    assert torch.equal(y, bias[[0] * (M // 2) + [2] * (M - M // 2)])


def test_factors_of_any_strides(backend):
    """As PEFT's parameters give them: [r E, K] and [N, r E]."""
    args = list(cases.make(OP, STACKS[0]))
    expected = ops.grouped_lora_linear_4bit(*args)
    A, B = args[12], args[13]
    args[12] = A.flatten(0, 1).clone().view(A.shape)
    args[13] = B.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    tolerance.assert_same_bits("y", ops.grouped_lora_linear_4bit(*args), expected)
