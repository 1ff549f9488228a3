"""grouped_lora_linear_4bit_backward: dx, and the gradients of every expert's adapter over its own rows."""

import pytest
import torch

import cases
import edges
import tolerance
from cases import Case
from conftest import each_case
from lowrank_kernels.schema import ops
from test_grouped_lora_linear_4bit import STACKS

OP = "grouped_lora_linear_4bit_backward"


def with_offsets(args, *offsets):
    return (*args[:12], torch.tensor(offsets, dtype=torch.int32), *args[13:])


@each_case(cases.LARGE[:6], cases.SHARED[::2], edges.linear)
def test_bound(case, backend):
    dx, dA, dB = tolerance.problem(OP, case).check()
    assert (dx.dtype, dA.dtype, dB.dtype) == (case.dtype, case.adapter, case.adapter)


@pytest.mark.parametrize("case", STACKS)
@pytest.mark.parametrize("offsets", [(0, 0, 0, 0), (0, 9, 9, 20), (1, 5, 22, 30), (30,) * 4])
def test_experts_with_any_number_of_rows(case, offsets, backend):
    args = with_offsets(cases.make(OP, case), *offsets)
    dx, dA, dB = ops.grouped_lora_linear_4bit_backward(*args)
    tolerance.check(OP, args, (dx, dA, dB))
    assert not dx[offsets[-1] :].any()
    for e, rows in enumerate(b - a for a, b in zip((0, *offsets), offsets)):
        assert rows or not (dA[e].any() or dB[e].any())


@pytest.mark.parametrize("case", [STACKS[1], STACKS[2]])
def test_only_what_is_needed(case, backend):
    args = cases.make(OP, case)
    full = ops.grouped_lora_linear_4bit_backward(*args)
    for i in range(3):
        needs = [j == i for j in range(3)]
        got = ops.grouped_lora_linear_4bit_backward(*args[:-3], *needs)
        tolerance.assert_same_bits(OP, got[i], full[i])
        assert all(got[j].shape == (0,) for j in range(3) if j != i)


@pytest.mark.parametrize("M", [0, 3, 40])
def test_dx_of_no_adapter_is_the_forward_of_the_transposed_stack(M, backend):
    args = cases.make(OP, Case(M, 48, 256, "nf4", 64, True, scaling=0.0))
    dx, _, _ = ops.grouped_lora_linear_4bit_backward(*args)
    dy, weight, offsets, transposed = args[0], args[3:12], args[12], args[13]
    base = ops.grouped_linear_4bit(dy, *weight, offsets, not transposed, None)
    assert torch.equal(dx, base)
