"""Many adapters in one batch: sizes on each side of the kernels' tiles, and which bits depend on what.

The kernels take tiles of 16 to 128 rows of one adapter; shrink 256 columns x 16 ranks of them in steps of
32 rows, adding up to 16 planes of columns; expand 16 or 64 rows x 128 columns.
"""

import random

import pytest
import torch

import cases
import conftest
import lowrank_kernels as lk
import tolerance
from emulator import thread_order
from lowrank_kernels.schema import ops

KERNELS = [k for k in conftest.KERNELS if k == "emulator"]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# Tokens of six sequences, one of each slot, and two without adapter: tiles of 16, 32, 64 and 128 rows.
TOKENS = {
    "decode": (1, 1, 1, 1, 1, 1, 1, 1),
    "16": (16, 0, 15, 1, 3, 8, 2, 5),
    "32": (17, 32, 1, 31, 0, 16, 1, 0),
    "64": (33, 1, 64, 0, 63, 2, 0, 3),
    "128": (65, 128, 1, 0, 31, 33, 2, 2),
    "more": (129, 1, 0, 257, 3, 127, 0, 1),
}
FACTORS = {
    "tokens": tuple(TOKENS),
    "NK": ((8, 8), (8, 264), (64, 72), (72, 64), (136, 520), (520, 128), (128, 256), (5, 33)),
    "dtype": (BF16, F16, F32),
    "R": (1, 3, 8, 16, 17, 20, 64, 100),
    "adapter": (F32, BF16, F16),
    "scaling": (2.0, -0.25),
    "dropout_p": (0.0, 0.25),
}
CASES = [(r.pop("tokens"), cases._case({"M": 0, **r})) for r in cases.pairwise(FACTORS)]
# More than one tile, strip, plane and pass; on tensor cores and in float32 arithmetic.
FEW = [
    ("64", cases.Case(0, 136, 264, dtype=BF16, R=20, adapter=BF16, dropout_p=0.25)),
    ("more", cases.Case(0, 72, 520, dtype=F16, R=12, adapter=F32)),
    ("128", cases.Case(0, 66, 257, dtype=F32, R=70, adapter=F16, dropout_p=0.5)),
]


@pytest.fixture(params=KERNELS, autouse=True)
def backend(request):
    """Not conftest.entered(): without a base no operand is rounded."""
    with lk.backends.use(request.param):
        yield request.param


def problem(tokens, case):
    """Arguments of multi_lora_ and multi_lora_backward."""
    slots = [*range(cases.SLOTS), -1, -1]
    order = random.sample(range(8), 8)
    counts = TOKENS[tokens] if isinstance(tokens, str) else tokens
    case = case._replace(M=sum(counts))
    plan, pages = cases.multi_args(case, [slots[i] for i in order], [counts[i] for i in order])
    x, dy, y = (cases.random_tensor(case.M, n, dtype=case.dtype) for n in (case.K, case.N, case.N))
    s = cases.random_tensor(case.M, -(-plan[5] // 8) * 8, dtype=F32)
    grads = (*cases.grad_args(pages[2]), True)
    return (y, x, *plan, *pages), (dy, x, s, *plan, *pages, *grads)


def run(forward, backward):
    y, s = cases.run("multi_lora_", forward)
    return y, s, *ops.multi_lora_backward(*backward)


def with_plan(forward, backward, plan):
    return (*forward[:2], *plan, *forward[8:]), (*backward[:3], *plan, *backward[9:])


def tiles_of(plan, tile_rows):
    """The same plan in tiles of other sizes."""
    tiles, page_ids, tile_of_row, rows, _, max_rank = plan
    whole = {}  # slot -> (row0, rows, page0)
    for slot, row0, count, page0 in tiles.tolist():
        first = whole.setdefault(slot, [row0, 0, page0])
        first[1] += count
    new, of_row = [], torch.full_like(tile_of_row, -1)
    for slot, (row0, count, page0) in whole.items():
        for start in range(row0, row0 + count, tile_rows):
            size = min(tile_rows, row0 + count - start)
            of_row[rows[start : start + size].long()] = len(new)
            new.append((slot, start, size, page0))
    tiles = torch.tensor(new, dtype=torch.int32).view(-1, 4)
    return tiles, page_ids, of_row, rows, tile_rows, max_rank


def only(plan, m):
    """The plan in which no row but m has its adapter."""
    tiles, page_ids, tile_of_row, _rows, _tile_rows, max_rank = plan
    tile = tiles[int(tile_of_row[m])].clone()
    tile[1], tile[2] = 0, 1
    of_row = torch.full_like(tile_of_row, -1)
    of_row[m] = 0
    return tile[None], page_ids, of_row, torch.tensor([m], dtype=torch.int32), 16, max_rank


def padded(plan, tiles=3, pages=5, rows=40):
    """The plan with room for more, as a CUDA graph has it."""
    more = [torch.zeros(n, dtype=torch.int32) for n in (tiles * 4, pages, rows)]
    return (
        torch.cat([plan[0], more[0].view(-1, 4)]), torch.cat([plan[1], more[1]]), plan[2],
        torch.cat([plan[3], more[2]]), *plan[4:],
    )  # fmt: skip


@pytest.mark.parametrize("tokens, case", CASES)
def test_products(tokens, case):
    forward, backward = problem(tokens, case)
    tolerance.check("multi_lora_", forward, cases.run("multi_lora_", forward))
    tolerance.check("multi_lora_backward", backward, ops.multi_lora_backward(*backward))


# 4104 columns are 17 strips: planes of two. 5 columns more are not for tensor cores.
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("NK", [(8, 4104), (4104, 8), (3, 8197)])
def test_planes_of_several_strips(dtype, NK):
    case = cases.Case(0, *NK, dtype=dtype, R=9, adapter=dtype, dropout_p=0.25)
    forward, backward = problem((1, 40, 2, 0, 0, 3, 1, 1), case)
    tolerance.check("multi_lora_", forward, cases.run("multi_lora_", forward))
    tolerance.check("multi_lora_backward", backward, ops.multi_lora_backward(*backward))


@pytest.mark.parametrize("tokens, case", FEW)
def test_the_order_of_threads_does_not_show(tokens, case):
    arguments = problem(tokens, case)
    expected = run(*arguments)
    for kind, seed in ((1, 0), (2, 1), (2, 2)):
        with thread_order(kind, seed):
            actual = run(*arguments)
        tolerance.assert_same_bits(f"order {kind}, {seed}", actual, expected)


@pytest.mark.parametrize("tokens, case", FEW)
def test_the_tiles_do_not_show(tokens, case):
    """Neither their size nor padding, in no output."""
    forward, backward = problem(tokens, case)
    expected = run(forward, backward)
    for tile_rows in (16, 32, 64, 128):
        plan = tiles_of(forward[2:8], tile_rows)
        actual = run(*with_plan(forward, backward, plan))
        tolerance.assert_same_bits(f"tiles of {tile_rows}", actual, expected)
        actual = run(*with_plan(forward, backward, padded(plan)))
        tolerance.assert_same_bits(f"padded tiles of {tile_rows}", actual, expected)


@pytest.mark.parametrize("tokens, case", FEW)
def test_rows_alone_and_in_company(tokens, case):
    forward, backward = problem(tokens, case)
    y, s, dx, *_ = run(forward, backward)
    with_adapter = [m for m, tile in enumerate(forward[4].tolist()) if tile >= 0]
    for m in random.sample(with_adapter, 6):
        alone = run(*with_plan(forward, backward, only(forward[2:8], m)))[:3]
        together = (y[m], s[m], dx[m])
        tolerance.assert_same_bits(f"row {m}", [t[m] for t in alone], together)


@pytest.mark.parametrize("tokens, case", FEW)
def test_rows_without_adapter(tokens, case):
    """Their y is not touched, not even a zero's sign; their S and dx are zero."""
    forward, backward = problem(tokens, case)
    plan, ranks = forward[2:8], forward[10]
    slots = plan[0][plan[2].clamp(min=0).long(), 0].long()
    without = plan[2] < 0
    nothing = without | (ranks[slots] == 0)  # adapters that do not cover the module
    forward[0][nothing, 0] = -0.0
    forward[1][nothing] = torch.nan
    y, s, dx, *_ = run(forward, backward)
    tolerance.assert_same_bits("y", y[nothing], forward[0][nothing])
    assert nothing.sum() > without.sum() > 0
    assert not s[nothing].count_nonzero() and not dx[nothing].count_nonzero()


@pytest.mark.parametrize("tokens, case", FEW)
def test_gradients_are_only_where_they_are_wanted(tokens, case):
    """Zero in rows of no slot and of slots without rows; without gradients dx is the same."""
    _, backward = problem(tokens, case)
    *rest, grad_rows, grad_rank, _ = backward
    ranks = rest[11]
    dx, dA, dB = ops.multi_lora_backward(*backward)
    present = set(rest[3][:, 0].tolist())
    wanted = torch.zeros(grad_rank + 4, dtype=torch.bool)
    for u in present:
        if grad_rows[u] >= 0:
            wanted[2 + grad_rows[u] : 2 + grad_rows[u] + ranks[u]] = True
    moved = torch.where(grad_rows < 0, grad_rows, grad_rows + 2)
    del [torch.full((grad_rank + 4, case.K), torch.nan) for _ in range(8)][:]
    actual = ops.multi_lora_backward(*rest, moved, grad_rank + 4, True)
    tolerance.assert_same_bits("dx", actual[0], dx)
    for new, old in zip(actual[1:], (dA, dB), strict=True):
        assert not new[~wanted].count_nonzero() and wanted.any()
        tolerance.assert_same_bits("gradients", new[2:-2], old)
    without = ops.multi_lora_backward(*rest, torch.full_like(grad_rows, -1), 0, True)
    tolerance.assert_same_bits("dx alone", without[0], dx)
    only_gradients = ops.multi_lora_backward(*rest, grad_rows, grad_rank, False)
    tolerance.assert_same_bits("gradients alone", only_gradients[1:], (dA, dB))


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_views(dtype):
    """Columns of wider matrices; where they begin at odd addresses, in float32 arithmetic."""
    case = cases.Case(0, 72, 264, dtype=dtype, R=20, adapter=dtype, dropout_p=0.25)
    forward, backward = problem("32", case)
    expected = run(forward, backward)

    def view(t, before, after):
        wide = torch.full((t.shape[0], before + t.shape[1] + after), torch.nan, dtype=t.dtype)
        wide[:, before : before + t.shape[1]] = t
        return wide, wide[:, before : before + t.shape[1]]

    for before, after in ((8, 16), (1, 0), (3, 8)):
        (wide, y), (_, x), (_, dy) = (view(t, before, after) for t in (*forward[:2], backward[0]))
        s = ops.multi_lora_(y, x, *forward[2:])
        actual = (y, s, *ops.multi_lora_backward(dy, x, *backward[2:]))
        if before % 8 == 0 or dtype == F32:
            tolerance.assert_same_bits(f"view {before}", actual, expected)
        tolerance.check("multi_lora_", forward, (y, s))
        tolerance.check("multi_lora_backward", backward, actual[2:])
        assert wide[:, :before].isnan().all() and wide[:, before + case.N :].isnan().all()


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("which", ["x", "dy", "A", "B", "S"])
def test_infinities_and_nans_spread_as_in_ieee(dtype, value, which):
    """Parts of an operand must not make a NaN of an infinity, nor spoil neighbours."""
    forward, backward = problem("16", cases.Case(0, 40, 72, dtype=dtype, R=12))
    plan, (A, B, ranks, *_) = forward[2:8], forward[8:]
    _, row0, _, page0 = next(t for t in plan[0].tolist() if ranks[t[0]] > 0)
    row, page = int(plan[3][row0]), int(plan[1][page0])
    spoiled = {
        "x": forward[1][row], "dy": backward[0][row], "S": backward[2][row],
        "A": A[page, 0], "B": B[page, 0],
    }  # fmt: skip
    spoiled[which][0] = value
    tolerance.check("multi_lora_", forward, cases.run("multi_lora_", forward))
    tolerance.check("multi_lora_backward", backward, ops.multi_lora_backward(*backward))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_dropped_elements_are_gone(dtype):
    """Even those that are no numbers."""
    case = cases.Case(0, 16, 264, dtype=dtype, R=8, dropout_p=0.5)
    forward, backward = problem("16", case)
    pages = (*forward[8:12], torch.full((cases.SLOTS,), 0.5, dtype=torch.float64), forward[13])
    forward, backward = (*forward[:8], *pages), (*backward[:9], *pages, *backward[15:])
    clean = run(forward, backward)
    x = forward[1]
    kept = tolerance.reference.dropout_mask(*x.shape, 0.5, forward[13]) != 0
    x[~kept] = torch.nan
    tolerance.assert_same_bits("outputs", run(forward, backward), clean)


# -- with a base: each family ------------------------------------------------------------------------------

# gemv; gemv with split_k; mma of 64 rows with split_k; simt; matmul on tensor cores and of float32.
BASES = [
    ("16", cases.Case(0, 72, 128, dtype=BF16, bias=BF16, R=20, adapter=BF16, dropout_p=0.25)),
    ("decode", cases.Case(0, 40, 8192, dtype=F16, bias=F32, R=8, adapter=F32)),
    ("32", cases.Case(0, 72, 512, dtype=F16, bias=None, R=12, adapter=F16, dropout_p=0.25)),
    ("16", cases.Case(0, 33, 100, dtype=BF16, bias=F32, R=8, adapter=BF16, dropout_p=0.5)),
    ("more", cases.Case(0, 72, 128, dtype=BF16, bias=F32, R=12, adapter=F32, dropout_p=0.25)),
    ("128", cases.Case(0, 33, 100, dtype=F32, bias=F32, R=12, adapter=F32, dropout_p=0.25)),
]


def base_problem(tokens, case):
    """Arguments of multi_lora_linear_4bit and its backward."""
    forward, backward = problem(tokens, case)
    weight, bias = cases.random_weight(case).op_args(), cases._bias(case)
    grad_rows, grad_rank, need_dx = backward[15:]
    return (forward[1], *weight, *forward[2:], bias), (
        *backward[:3], *weight, *backward[3:15], bias, grad_rows, grad_rank, need_dx,
        bias is not None,
    )  # fmt: skip


def check_base(op, args):
    with tolerance.operands_rounded():
        outputs = getattr(ops, op)(*args)
        tolerance.check(op, args, outputs)
    return outputs


@pytest.mark.parametrize("tokens, case", BASES)
def test_each_family_of_the_base(tokens, case):
    forward, backward = base_problem(tokens, case)
    expected = check_base("multi_lora_linear_4bit", forward)
    gradients = check_base("multi_lora_linear_4bit_backward", backward)
    for kind, seed in ((1, 0), (2, 1)):
        with thread_order(kind, seed):
            actual = ops.multi_lora_linear_4bit(*forward)
            actual_gradients = ops.multi_lora_linear_4bit_backward(*backward)
        tolerance.assert_same_bits(f"order {kind}", actual, expected)
        tolerance.assert_same_bits(f"order {kind}", actual_gradients, gradients)


@pytest.mark.parametrize("tokens, case", BASES)
def test_rows_of_the_base_alone_are_those_of_the_base(tokens, case):
    """All bits of a batch without adapters, whatever room its plan has; and of such rows in any batch."""
    forward, backward = base_problem(tokens, case)
    x, weight, plan, bias = forward[0], forward[1:10], forward[10:16], forward[-1]
    y = ops.linear_4bit(x, *weight, bias)
    dx = ops.linear_4bit_dx(backward[0], *weight)
    empty = (plan[0][:0], plan[1][:0], torch.full_like(plan[2], -1), plan[3][:0], *plan[4:])
    without = plan[2] < 0
    for name, p in (("no tiles", empty), ("padding", padded(empty)), ("adapters", plan)):
        args = (*forward[:10], *p, *forward[16:])
        rows = without if name == "adapters" else slice(None)
        family = cases.family("linear_4bit", case._replace(M=x.shape[0]), "emulator")
        if family.startswith("matmul") and name != "no tiles":
            continue  # the bias is rounded first
        actual, s = ops.multi_lora_linear_4bit(*args)
        tolerance.assert_same_bits(f"y, {name}", actual[rows], y[rows])
        assert not s[rows].count_nonzero()
        args = (*backward[:12], *p, *backward[18:])
        actual = ops.multi_lora_linear_4bit_backward(*args)
        tolerance.assert_same_bits(f"dx, {name}", actual[0][rows], dx[rows])
        if name != "adapters":
            assert not actual[1].count_nonzero() and not actual[2].count_nonzero()
