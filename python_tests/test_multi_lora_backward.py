"""multi_lora_backward: gradients of many adapters, against float64 and autograd; what both backwards promise."""

import pytest
import torch

import cases
import edges
import lowrank_kernels as lk
import tolerance
from cases import BF16, F32, Case
from conftest import each_case
from lowrank_kernels import reference
from lowrank_kernels.arguments import PagesArgs, PlanArgs
from test_multi_lora_ import EVERYWHERE, RANKS, SOME

OP = "multi_lora_backward"
BACKWARD = ("multi_lora_backward", "multi_lora_linear_4bit_backward")
ops = lk.schema.ops


@each_case(EVERYWHERE, [*SOME, *RANKS[::3]], edges.many_adapters)
def test_bound(case, backend):
    tolerance.problem(OP, case).check()


@pytest.mark.parametrize("case", [Case(19, 12, 20, R=9), Case(19, 12, 20, R=9, dropout_p=0.4)])
def test_the_reference_is_what_autograd_says(case):
    """Differentiating the forward formula, row by row in float64."""
    plan, pages = cases.multi_args(case, [0, 1, -1, 2, 0], [5, 4, 3, 5, 2])
    y, x, *rest = torch.randn(19, 12), torch.randn(19, 20), *plan, *pages
    A, B = (p.double().requires_grad_() for p in rest[6:8])
    x = x.double().requires_grad_()
    ranks = rest[8]
    args = (*rest[:6], A, B, *rest[8:])
    rows = []
    for m, adapter in reference._adapters_of_rows(x, PlanArgs(*args[:6]), PagesArgs(*args[6:])):
        s = (x[m] * adapter.mask) @ adapter.A.T
        rows.append(adapter.scaling * (s @ adapter.B))
    with_adapter = [m for m, t in enumerate(rest[2].tolist()) if t >= 0]
    dy = torch.randn(case.M, case.N, dtype=torch.float64)
    dx, dA, dB = torch.autograd.grad(torch.stack(rows), (x, A, B), dy[with_adapter])
    _, s = reference.multi_lora_(y, x.detach(), *rest)
    grad_rows, grad_rank = cases.grad_args(ranks)
    actual = reference.multi_lora_backward(dy, x.detach(), s, *rest, grad_rows, grad_rank, True)
    torch.testing.assert_close(actual[0], dx)
    tiles, page_ids, *_ = rest[:6]
    page_rank = A.shape[1]
    for slot, _, _, page0 in tiles.tolist():
        rank, first = int(ranks[slot]), int(grad_rows[slot])
        if first < 0:
            continue
        ids = page_ids[page0 : page0 + -(-rank // page_rank)].long()
        for got, pages in ((actual[1], dA), (actual[2], dB)):
            torch.testing.assert_close(got[first : first + rank], pages[ids].flatten(0, 1)[:rank])


def _places(op):
    """Positions of grad_rows, and of ranks."""
    names = [a.name for a in getattr(ops, op).default._schema.arguments]
    return names.index("grad_rows"), names.index("ranks")


@pytest.mark.parametrize("op", BACKWARD)
def test_gradients_come_where_they_are_asked_for(op, backend):
    """With the bits they have when all are asked for; rows that no adapter owns are zero."""
    case = Case(60, 33, 96, R=12, bias=F32)
    args = list(cases.make(op, case))
    at, ranks_at = _places(op)
    ranks = args[ranks_at].tolist()
    full, first = [], 0
    for rank in ranks:
        full.append(first)
        first += rank
    args[at], args[at + 1] = torch.tensor(full, dtype=torch.int32), first
    everything = getattr(ops, op)(*args)
    for slot, rank in enumerate(ranks):
        only = [-1] * len(ranks)
        only[slot] = 5
        args[at], args[at + 1] = torch.tensor(only, dtype=torch.int32), rank + 7
        outputs = getattr(ops, op)(*args)
        tolerance.assert_same_bits("dx", outputs[0], everything[0])
        for one, every in zip(outputs[1:3], everything[1:3]):
            mine = slice(full[slot], full[slot] + rank)
            tolerance.assert_same_bits(f"slot {slot}", one[5 : 5 + rank], every[mine])
            assert not one[:5].any() and not one[5 + rank :].any()


@pytest.mark.parametrize("op", BACKWARD)
def test_nothing_is_done_that_nobody_needs(op, backend):
    case = Case(20, 33, 96, R=12, bias=F32)
    args = list(cases.make(op, case))
    at, _ = _places(op)
    full = getattr(ops, op)(*args)
    args[at + 2] = False
    without_dx = getattr(ops, op)(*args)
    assert without_dx[0].numel() == 0
    tolerance.assert_same_bits("gradients", without_dx[1:], full[1:])
    args[at + 2] = True
    args[at], args[at + 1] = torch.full_like(args[at], -1), 0
    only_dx = getattr(ops, op)(*args)
    tolerance.assert_same_bits("dx", only_dx[0], full[0])
    assert only_dx[1].shape == (0, 96) and only_dx[2].shape == (0, 33)


@pytest.mark.parametrize("tokens", [[300], [130, 1, 64], [1] * 70, [0], []])
def test_batches_of_every_form(tokens, backend):
    case = Case(sum(tokens), 33, 160, R=12)
    plan, pages = cases.multi_args(case, [i % cases.SLOTS for i in range(len(tokens))], tokens)
    dy, x = (cases.random_tensor(case.M, n, dtype=F32) for n in (case.N, case.K))
    s = torch.randn(case.M, -(-plan[-1] // 8) * 8)
    args = (dy, x, s, *plan, *pages, *cases.grad_args(pages[2]), True)
    # Sums over many rows of products of unit size: S here is no sum of A, so the bound is that of any data.
    tolerance.check(OP, args, ops.multi_lora_backward(*args))


def test_a_row_of_dx_has_the_bits_it_has_in_any_batch(backend):
    case = Case(50, 70, 130, R=12, dtype=BF16)
    plan, pages = cases.multi_args(case, [0, 1, 2], [20, 20, 10])
    dy, x = (cases.random_tensor(case.M, n, dtype=BF16) for n in (case.N, case.K))
    s = torch.zeros(case.M, -(-plan[-1] // 8) * 8)
    none = torch.full((cases.SLOTS,), -1, dtype=torch.int32), 0
    dx = ops.multi_lora_backward(dy, x, s, *plan, *pages, *none, True)[0]
    other = dy.clone()
    other[20:] = torch.rand_like(other[20:])
    again = ops.multi_lora_backward(other, x, s, *plan, *pages, *none, True)[0]
    tolerance.assert_same_bits("first sequence", again[:20], dx[:20])


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_infinities_and_nans_stay_with_their_adapter(value, backend):
    case = Case(24, 40, 96, R=5)
    plan, pages = cases.multi_args(case, [0, 1, 2], [8, 8, 8])
    dy, x = (cases.random_tensor(24, n, dtype=F32) for n in (40, 96))
    s = torch.randn(24, -(-plan[-1] // 8) * 8)
    ranks = pages[2].tolist()
    first = [sum(ranks[:u]) for u in range(cases.SLOTS)]
    grads = torch.tensor(first, dtype=torch.int32), sum(ranks)
    dy[3, 7] = value
    args = (dy, x, s, *plan, *pages, *grads, True)
    dx, dA, dB = outputs = ops.multi_lora_backward(*args)
    tolerance.check(OP, args, outputs)
    slot = int(plan[0][int(plan[2][3]), 0])
    others = [
        r for u in range(cases.SLOTS) if u != slot for r in range(first[u], first[u] + ranks[u])
    ]
    assert dA[others].isfinite().all() and dB[others].isfinite().all()
    assert dx[[m for m in range(24) if m != 3]].isfinite().all()


@pytest.mark.parametrize("op", BACKWARD)
@pytest.mark.parametrize("first", [2**31 - 1, 2**31 - 8, 1])
def test_gradients_never_leave_their_rows(op, first):
    """The first row and the rank are added in 64 bits: 2**31 - 1 + rank is not a small number."""
    args = list(cases.make(op, Case(12, 33, 64, R=12)))
    grad_rows, ranks = _places(op)
    slot = int(args[ranks].argmax())
    args[grad_rows] = torch.full((cases.SLOTS,), -1, dtype=torch.int32)
    args[grad_rows][slot], args[grad_rows + 1] = first, int(args[ranks][slot])
    expected = f"grad_rows: expected rows below grad_rank = 12, got rows from {first} for the 12 "
    with pytest.raises(RuntimeError, match=f"{expected}ranks of slot {slot}"):
        getattr(ops, op)(*args)
    args[grad_rows][slot] = 0
    getattr(ops, op)(*args)


@pytest.mark.parametrize("grad_rank", [-1, 2**31, 2**62])
def test_a_grad_rank_that_no_row_reaches_is_refused(grad_rank):
    args = list(cases.make(OP, Case(12, 33, 64, R=12)))
    args[-2] = grad_rank
    with pytest.raises(RuntimeError, match=f"grad_rank: expected 0..2.31-1, got {grad_rank}"):
        ops.multi_lora_backward(*args)
