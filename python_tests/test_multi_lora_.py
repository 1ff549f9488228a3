"""multi_lora_: y += what each row's adapter adds, against float64; and what both forward operators promise."""

import random

import pytest
import torch

import cases
import edges
import lowrank_kernels as lk
import tolerance
from cases import BF16, F16, F32, Case
from conftest import each_case

OP = "multi_lora_"
FORWARD = ("multi_lora_", "multi_lora_linear_4bit")
# Every third: a batch has many shapes in itself.
SOME = [*cases.PAIRWISE[::3], *cases.FUZZ[::4]]
EVERYWHERE = [*cases.FEW, *cases.LARGE[::3]]
RANKS = [
    Case(12, 70, 130, R=r, adapter=a) for r in (1, 3, 8, 20, 100, 256) for a in (F32, BF16, F16)
]


@each_case(EVERYWHERE, [*SOME, *RANKS], edges.many_adapters)
def test_bound(case, backend):
    tolerance.problem(OP, case).check()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_one_rounding(dtype, backend):
    """y of large values gets a delta below its spacing: lost where it is rounded away, else to the last bit."""
    case = Case(9, 40, 64, R=8, dtype=dtype)
    args = list(cases.make(OP, case))
    args[0] = args[0] * 100
    tolerance.check(OP, tuple(args), cases.run(OP, args))


@pytest.mark.parametrize("op", FORWARD)
@pytest.mark.parametrize("tokens", [[300], [130, 1, 64], [1] * 70, [0, 0], []])
def test_batches_of_every_form(op, tokens, backend):
    """One adapter over several tiles, one row each, nothing at all."""
    case = Case(sum(tokens), 33, 160, "nf4", 32, R=12)
    plan, pages = cases.multi_args(case, [i % cases.SLOTS for i in range(len(tokens))], tokens)
    args = _with_base(op, case, plan, pages)
    tolerance.check(op, args, cases.run(op, args))


def _with_base(op, case, plan, pages, x=None):
    x = cases.random_tensor(case.M, case.K, dtype=case.dtype) if x is None else x
    if op == "multi_lora_":
        return torch.zeros(case.M, case.N, dtype=case.dtype), x, *plan, *pages
    return x, *cases.random_weight(case).op_args(), *plan, *pages, None


@pytest.mark.parametrize("op", FORWARD)
def test_without_adapters_nothing_is_added(op, backend):
    case = Case(20, 48, 128, "nf4", 64, R=8, dtype=BF16)
    plan, pages = cases.multi_args(case, [-1], [20])
    args = _with_base(op, case, plan, pages)
    y, s = cases.run(op, args)
    if op == "multi_lora_":
        assert torch.equal(y, args[0])
    else:
        tolerance.assert_same_bits(op, y, lk.schema.ops.linear_4bit(*args[:10], None))
    assert s.abs().sum() == 0


def test_s_is_zero_past_the_rank_and_without_an_adapter(backend):
    case = Case(40, 33, 96, R=20)
    args = cases.make(OP, case)
    _, s = cases.run(OP, args)
    tiles, _, tile_of_row, *_ = args[2:8]
    ranks = args[10]
    for m, tile in enumerate(tile_of_row.tolist()):
        rank = 0 if tile < 0 else int(ranks[tiles[tile, 0]])
        assert not s[m, rank:].any()


# -- a row's bits --------------------------------------------------------------------------------------


def _row_alone(args, m):
    """multi_lora_ on row m and nothing else."""
    y, x, tiles, page_ids, tile_of_row, _rows, _tile_rows, max_rank, *pages = args
    tile = int(tile_of_row[m])
    slot, _, _, page0 = tiles[tile].tolist()
    pages_of = {slot: page_ids[page0:].tolist()[: -(-max_rank // pages[0].shape[1])]}
    return (y[m : m + 1], x[m : m + 1], *cases.plan_args([slot], [1], pages_of, max_rank), *pages)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("R", [1, 12, 70])
@pytest.mark.parametrize("tokens", [[1] * 9, [140, 3, 17, 1, 40]])
def test_a_row_has_the_bits_it_has_alone(dtype, R, tokens, backend):
    """Whoever is in the batch, and however many rows its adapter has there."""
    case = Case(sum(tokens), 130, 300, R=R, dtype=dtype)
    slots = [random.randrange(cases.SLOTS) for _ in tokens]
    args = (
        cases.random_tensor(case.M, case.N, dtype=dtype),
        *_with_base(OP, case, *cases.multi_args(case, slots, tokens))[1:],
    )
    y, s = cases.run(OP, args)
    for m in {0, 1, case.M // 2, case.M - 1}:
        if int(args[4][m]) < 0:
            continue
        y1, s1 = cases.run(OP, _row_alone(args, m))
        tolerance.assert_same_bits(f"row {m} of y", y[m : m + 1], y1)
        tolerance.assert_same_bits(f"row {m} of S", s[m : m + 1], s1)


@pytest.mark.parametrize("op", FORWARD)
def test_other_adapters_beside_it_change_nothing(op, backend):
    case = Case(30, 65, 128, "nf4", 64, R=16)
    plan, pages = cases.multi_args(case, [0, 1, -1, 2], [10, 5, 5, 10])
    args = _with_base(op, case, plan, pages)
    y, _ = cases.run(op, args)
    (A, B, *tables) = pages
    tiles, page_ids, *_ = plan
    own = page_ids[int(tiles[0, 3]) :][: -(-int(tables[0][0]) // A.shape[1])].long()
    A, B = torch.rand_like(A), torch.rand_like(B)
    A[own], B[own] = pages[0][own], pages[1][own]
    x = args[0 if op != OP else 1].clone()
    x[10:] = torch.rand_like(x[10:])
    changed, _ = cases.run(op, _replace_x(op, args, x, (A, B, *tables)))
    tolerance.assert_same_bits(op, changed[:10], y[:10])


def _replace_x(op, args, x, pages):
    if op == OP:
        return args[0], x, *args[2:8], *pages
    return x, *args[1:16], *pages, None


@pytest.mark.parametrize("op", FORWARD)
@pytest.mark.parametrize(
    "case", [Case(70, 96, 320, R=20), Case(40, 33, 64, R=3, dtype=BF16, dropout_p=0.3)]
)
def test_larger_tiles_give_the_same_bits(op, case, backend):
    """tile_rows is how the work is cut."""
    args = cases.make(op, case)
    expected = cases.run(op, args)
    start = 2 if op == OP else 10
    tiles, page_ids, tile_of_row, rows, _, max_rank = args[start : start + 6]
    smaller, of_row = [], tile_of_row.clone()
    for slot, row0, count, page0 in tiles.tolist():
        for first in range(row0, row0 + count, 16):
            size = min(16, row0 + count - first)
            of_row[rows[first : first + size].long()] = len(smaller)
            smaller.append((slot, first, size, page0))
    padding = [(0, 0, 0, 0)] * 3  # as plans of a fixed size have it
    cut = torch.tensor([*smaller, *padding], dtype=torch.int32).view(-1, 4)
    plan = (cut, page_ids, of_row, rows, 16, max_rank)
    tolerance.assert_same_bits(
        op, cases.run(op, (*args[:start], *plan, *args[start + 6 :])), expected
    )


# -- values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", FORWARD)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_infinities_and_nans_stay_in_their_row(op, value, backend):
    case = Case(24, 40, 128, "nf4", 64, R=5)
    plan, pages = cases.multi_args(case, [0, 1, 2], [8, 8, 8])
    args = _with_base(op, case, plan, pages)
    args[0 if op != OP else 1][3, 7] = value
    y, s = cases.run(op, args)
    tolerance.check(op, args, (y, s))
    clean = [m for m in range(24) if m != 3]
    assert y[clean].isfinite().all() and s[clean].isfinite().all()


@pytest.mark.parametrize("case", [Case(17, 64, 256, R=16), Case(5, 64, 96, R=16, dtype=BF16)])
def test_values_of_every_size(case, backend):
    args = list(cases.make(OP, case))
    for i in (0, 1, 8, 9):
        args[i] = (args[i].float() * 10.0 ** torch.randint(-4, 4, args[i].shape)).to(args[i].dtype)
    c = tolerance.c_worst_case(case.K + case.R)
    tolerance.check(OP, tuple(args), cases.run(OP, args), c)


def test_indices_are_checked_on_a_cpu():
    """A plan of other pages reads nothing that is not there."""
    case = Case(20, 33, 64, R=12)
    plan, pages = cases.multi_args(case, [0, 1], [12, 8])
    y, x = torch.zeros(20, 33), torch.zeros(20, 64)
    tiles, page_ids, tile_of_row, rows, *_ = plan

    def broken(**changes):
        names = ("tiles", "page_ids", "tile_of_row", "rows", "tile_rows", "max_rank")
        return [changes.get(n, v) for n, v in zip(names, plan)]

    def spoiled(t, index, value):
        t = t.clone()
        t[index] = value
        return t

    bad = [
        broken(tiles=spoiled(tiles, (0, 0), cases.SLOTS)), broken(tiles=spoiled(tiles, (0, 2), 300)),
        broken(tiles=spoiled(tiles, (-1, 3), 1000)), broken(tiles=spoiled(tiles, (0, 1), -1)),
        broken(page_ids=spoiled(page_ids, 0, 10_000)), broken(page_ids=spoiled(page_ids, 0, -1)),
        broken(rows=spoiled(rows, 0, 20)), broken(tile_of_row=spoiled(tile_of_row, 0, 99)),
        broken(max_rank=0), broken(tiles=spoiled(tiles, (0, 1), 2**31 - 1)),
        broken(tiles=spoiled(tiles, (-1, 3), 2**31 - 1)),
    ]  # fmt: skip
    for arguments in bad:
        with pytest.raises(RuntimeError, match="plan: its indices do not fit"):
            lk.schema.ops.multi_lora_(y, x, *arguments, *pages)
    with pytest.raises(RuntimeError, match="tile_rows: expected 16, 32, 64 or 128, got 7"):
        lk.schema.ops.multi_lora_(y, x, *broken(tile_rows=7), *pages)
    with pytest.raises(RuntimeError, match="tile_of_row: expected 20"):
        lk.schema.ops.multi_lora_(y, x, *broken(tile_of_row=tile_of_row[1:]), *pages)
    assert not y.any()
