"""The batch planner against a model in Python that says what the arrays mean."""

import random
import time
import timeit

import numpy as np
import pytest

import conftest
from lowrank_kernels import backends

if conftest.ONLY_REFERENCE:
    pytest.skip("LOWRANK_BACKEND=reference: needs the native library", allow_module_level=True)

host = backends._host
TILE_ROWS = (16, 32, 64, 128)


def pool_of(*pages):
    """A pool, and a slot for each number of pages; what is free before and between them is not in order."""
    pool = host.PagePool(sum(pages) + 8)
    holes = [pool.load(1)[0] for _ in range(8)]
    for slot in random.sample(holes, 8):
        pool.evict(slot)
    return pool, [pool.load(n)[0] for n in pages]


def model(pool, slots, tokens, tile_rows=0):
    """(tiles, page_ids, tile_of_row, rows, tile_rows), with no padding."""
    slot_of_row = [slot for slot, n in zip(slots, tokens) for _ in range(n)]
    rows_of = {
        slot: [row for row, s in enumerate(slot_of_row) if s == slot]
        for slot in sorted(set(slot_of_row) - {-1})
    }
    most = max(map(len, rows_of.values()), default=0)
    tile_rows = tile_rows or next((n for n in TILE_ROWS if n >= most), TILE_ROWS[-1])
    tiles, page_ids, rows, tile_of_row = [], [], [], [-1] * len(slot_of_row)
    for slot, own in rows_of.items():
        for start in range(0, len(own), tile_rows):
            part = own[start : start + tile_rows]
            for row in part:
                tile_of_row[row] = len(tiles)
            tiles.append([slot, len(rows), len(part), len(page_ids)])
            rows += part
        page_ids += pool.pages(slot)
    return tiles, page_ids, tile_of_row, rows, tile_rows


def padded(values, size, zero=0):
    assert len(values) <= size
    return values + [zero] * (size - len(values))


def check(pool, slots, tokens, tile_capacity=0, page_capacity=0, tile_rows=0, out=None):
    """The plan, every element of which must be as the model has it."""
    plan = host.plan(pool, slots, tokens, tile_capacity, page_capacity, tile_rows, out)
    tiles, page_ids, tile_of_row, rows, tile_rows = model(pool, slots, tokens, tile_rows)
    used = sorted({tile[0] for tile in tiles})
    assert plan.slots == used
    assert plan.generations == [pool.generation(slot) for slot in used]

    M = sum(tokens)
    tiles = padded(tiles, tile_capacity or len(tiles), [0, 0, 0, 0])
    page_ids = padded(page_ids, page_capacity or len(page_ids))
    rows = padded(rows, M) if tile_capacity or page_capacity else rows
    assert (plan.M, plan.sequences, plan.tile_rows) == (M, len(slots), tile_rows)
    counts = (plan.tile_count, plan.page_count, plan.row_count)
    assert counts == (len(tiles), len(page_ids), len(rows))

    assert plan.tiles.shape == (len(tiles), 4)
    content, offsets = [], []
    for part in ([x for tile in tiles for x in tile], page_ids, tile_of_row, rows):
        offsets.append(len(content))
        content = padded(content + part, -(-len(content + part) // 4) * 4)
    assert plan.offsets == tuple(offsets)
    assert plan.buffer.dtype == np.int32 and plan.buffer.tolist() == content
    for view, part in (
        (plan.tiles, tiles),
        (plan.page_ids, page_ids),
        (plan.tile_of_row, tile_of_row),
        (plan.rows, rows),
    ):
        assert view.dtype == np.int32 and view.tolist() == part
        assert view.size == 0 or np.shares_memory(view, plan.buffer)
    return plan


def test_an_example_by_hand():
    pool = host.PagePool(8)
    a, b = pool.load(1)[0], pool.load(2)[0]
    plan = host.plan(pool, [b, -1, a, b], [17, 2, 1, 3])
    assert plan.tile_rows == 32
    assert plan.tiles.tolist() == [[a, 0, 1, 0], [b, 1, 20, 1]]
    assert plan.page_ids.tolist() == [0, 1, 2]
    assert plan.rows.tolist() == [19, *range(17), 20, 21, 22]
    assert plan.tile_of_row.tolist() == [1] * 17 + [-1, -1, 0, 1, 1, 1]


def test_no_sequences():
    pool, _ = pool_of(1)
    plan = check(pool, [], [])
    assert plan.M == plan.tile_count == plan.buffer.size == 0 and plan.tile_rows == 16
    assert check(pool, [], [], tile_capacity=3, page_capacity=2).tile_count == 3


def test_sequences_without_tokens():
    pool, (a, b) = pool_of(1, 3)
    assert check(pool, [a, b, -1], [0, 0, 0]).tile_count == 0
    assert check(pool, [a, b, -1, a], [0, 2, 0, 0]).slots == [b]


def test_base_only():
    pool, _ = pool_of(1)
    plan = check(pool, [-1, -1], [5, 300])
    assert (plan.M, plan.row_count, plan.tile_count, plan.page_count) == (305, 0, 0, 0)
    assert plan.slots == [] and plan.tile_of_row.tolist() == [-1] * 305


def test_one_adapter_over_many_tiles():
    pool, (a,) = pool_of(4)
    plan = check(pool, [a], [1000])
    assert plan.tiles[:, 2].tolist() == [128] * 7 + [104] and plan.page_count == 4
    check(pool, [a, -1] * 30, list(range(60)))


@pytest.mark.parametrize("most", [1, 16, 17, 32, 33, 64, 65, 128, 129])
def test_tile_rows_fit_the_largest_adapter(most):
    pool, (a, b) = pool_of(1, 1)
    expected = next((n for n in TILE_ROWS if n >= most), 128)
    tokens = [1] * most
    assert check(pool, [a, b], [most, 1]).tile_rows == expected
    assert check(pool, [a] * most + [-1], [*tokens, 500]).tile_rows == expected
    for fixed in TILE_ROWS:
        assert check(pool, [a, b], [most, 1], tile_rows=fixed).tile_rows == fixed


def random_batch(slots):
    """Prefill and decode mixed, with slots that come back, and without an adapter."""
    some = random.choices([-1, *slots], k=random.choice([1, 2, 5, 20, 60]))
    longest = random.choice([1, 3, 40, 300])
    prefill = random.random()
    return some, [random.randint(0, longest if random.random() < prefill else 1) for _ in some]


def test_random_batches():
    pool, slots = pool_of(*(random.randint(1, 9) for _ in range(24)))
    for _ in range(200):
        batch = random_batch(slots)
        check(pool, *batch, tile_rows=random.choice([0, 0, *TILE_ROWS]))
        victim = random.choice(slots)  # so that pages get out of order
        count = len(pool.pages(victim))
        pool.evict(victim)
        slots[slots.index(victim)] = pool.load(count)[0]


def test_capacity_makes_one_layout_of_all_batches():
    pool, slots = pool_of(*(random.randint(1, 4) for _ in range(16)))
    limits = {"tile_capacity": 40, "page_capacity": 64, "tile_rows": 16}
    layouts = set()
    out = None
    for _ in range(50):
        batch = random.choices([-1, *slots], k=24)
        plan = check(pool, batch, [2] * 24, **limits, out=out)
        layouts.add((plan.buffer.size, plan.offsets, plan.row_count, plan.tile_count))
        assert plan.row_count == 48
        out = plan.buffer
    assert len(layouts) == 1
    check(pool, slots, [2] * 16, page_capacity=80)
    check(pool, slots, [2] * 16, tile_capacity=16)


def test_capacity_that_is_too_small():
    pool, (a, b) = pool_of(3, 2)
    batch = ([a, b], [20, 1])
    check(pool, *batch, tile_rows=16, tile_capacity=3, page_capacity=5)
    message = "tile_capacity: expected at least the 3 tiles of this batch, got 2"
    with pytest.raises(ValueError, match=message):
        host.plan(pool, *batch, tile_rows=16, tile_capacity=2)
    message = "page_capacity: expected at least the 5 pages of this batch, got 4"
    with pytest.raises(ValueError, match=message):
        host.plan(pool, *batch, page_capacity=4)


def test_out_is_written_and_kept():
    pool, (a, b) = pool_of(3, 2)
    size = host.plan(pool, [a, b], [5, 6]).buffer.size
    out = np.full(size, 7, dtype=np.int32)
    plan = check(pool, [a, b], [5, 6], out=out)
    assert plan.buffer is out
    frozen = np.zeros(size, dtype=np.int32)
    frozen.flags.writeable = False
    wrong = {
        f"int32 of shape \\({size - 1},\\)": np.zeros(size - 1, dtype=np.int32),
        f"int32 of shape \\({size + 1},\\)": np.zeros(size + 1, dtype=np.int32),
        f"int64 of shape \\({size},\\)": np.zeros(size, dtype=np.int64),
        f"float32 of shape \\({size},\\)": np.zeros(size, dtype=np.float32),
        f"int32 of shape \\({size},\\), with gaps": np.zeros(2 * size, dtype=np.int32)[::2],
        f"int32 of shape \\({size},\\), read-only": frozen,
        f"int32 of shape \\(1, {size}\\)": np.zeros((1, size), dtype=np.int32),
        "list": [0] * size,
    }
    expected = f"out: expected a writable contiguous int32 array of shape \\({size},\\), got "
    for got, array in wrong.items():
        before = np.array(array)
        with pytest.raises(ValueError, match=expected + got + "$"):
            host.plan(pool, [a, b], [5, 6], out=array)
        assert np.array_equal(before, array)


def test_views_outlive_the_plan():
    pool, (a,) = pool_of(2)
    tiles = host.plan(pool, [a], [3]).tiles
    others = [host.plan(pool, [-1], [3]).buffer for _ in range(100)]
    assert tiles.tolist() == [[a, 0, 3, 0]] and len(others) == 100


def test_a_plan_does_not_outlive_its_adapters():
    pool, (a, b) = pool_of(2, 2)
    plan = host.plan(pool, [a, b, -1], [1, 2, 3])
    pool.pin(plan.slots, plan.generations)
    pool.unpin(plan.slots)
    pool.evict(b)
    pool.load(2)
    with pytest.raises(RuntimeError, match="no longer holds the adapter of generation"):
        pool.pin(plan.slots, plan.generations)


def test_attributes_are_read_only():
    pool, (a,) = pool_of(1)
    plan = host.plan(pool, [a], [1])
    for name in ("buffer", "tiles", "M", "slots"):
        with pytest.raises(AttributeError):
            setattr(plan, name, getattr(plan, name))


@pytest.mark.parametrize(
    ("slots", "tokens", "options", "message"),
    [
        ([0, 0], [1], {}, r"tokens: expected one count per sequence \(2\), got 1"),
        ([], [1], {}, r"tokens: expected one count per sequence \(0\), got 1"),
        ([0, 0], [1, -1], {}, r"tokens\[1\]: expected 0 or more, got -1"),
        ([0, 2], [1, 1], {}, r"slots\[1\]: expected a loaded slot or -1, got 2"),
        ([1], [0], {}, r"slots\[0\]: expected a loaded slot or -1, got 1"),
        ([-2], [1], {}, r"slots\[0\]: expected a loaded slot or -1, got -2"),
        ([2**40], [1], {}, r"slots\[0\]: expected a loaded slot or -1, got 1099511627776"),
        ([2**70], [1], {}, r"slots\[0\]: expected an int of 64 bits, got 1180591620717411303424"),
        (
            [0],
            [2**31],
            {},
            r"tokens\[0\]: expected at most 2147483647 rows in all, .* got 2147483648",
        ),
        (
            [0, -1],
            [9, 2**63 - 1],
            {},
            r"tokens\[1\]: .* so 2147483638 here, got 9223372036854775807",
        ),
        ([0], [1], {"tile_rows": 8}, "tile_rows: expected 16, 32, 64, 128 or 0, got 8"),
        ([0], [1], {"tile_rows": -16}, "tile_rows: expected 16, 32, 64, 128 or 0, got -16"),
        ([0], [1], {"tile_capacity": -1}, "tile_capacity: expected 0 or more, got -1"),
        ([0], [1], {"page_capacity": -1}, "page_capacity: expected 0 or more, got -1"),
        (
            [0],
            [1],
            {"tile_capacity": 2**62},
            "tile_capacity: expected at most 2147483647, got 4611686018427387904",
        ),
        (
            [0],
            [1],
            {"page_capacity": 2**31},
            "page_capacity: expected at most 2147483647, got 2147483648",
        ),
    ],
)
def test_errors(slots, tokens, options, message):
    pool = host.PagePool(4)
    pool.load(2)  # slot 0
    pool.load(1)
    pool.evict(1)
    with pytest.raises(ValueError, match=f"^{message}$"):
        host.plan(pool, slots, tokens, **options)


@pytest.mark.parametrize(
    ("slots", "tokens", "message"),
    [
        (0, [1], "slots: expected a sequence of ints, got 0"),
        ([0], None, "tokens: expected a sequence of ints, got None"),
        ([0], [1.0], r"tokens\[0\]: expected an int, got 1\.0"),
        ([0, None], [1, 1], r"slots\[1\]: expected an int, got None"),
        (["a7"], [1], r"slots\[0\]: expected an int, got 'a7'"),
    ],
)
def test_type_errors(slots, tokens, message):
    pool = host.PagePool(4)
    pool.load(2)
    with pytest.raises(TypeError, match=f"^{message}$"):
        host.plan(pool, slots, tokens)


def test_other_sequences_of_ints():
    pool, (a, b) = pool_of(1, 1)
    expected = host.plan(pool, [a, b], [2, 3]).buffer.tolist()
    for kind in (tuple, np.array):
        assert host.plan(pool, kind([a, b]), kind([2, 3])).buffer.tolist() == expected


@pytest.mark.parametrize("prompts", [0, 28])
def test_planning_is_quick(prompts):
    """512 sequences with an adapter each: some 10 µs of this thread's own time, whatever else the machine does."""
    pool, slots = pool_of(*[4] * 512)
    tokens = [128] * prompts + [1] * (512 - prompts)
    times = timeit.repeat(
        lambda: host.plan(pool, slots, tokens), timer=time.thread_time, number=20, repeat=25
    )
    assert min(times) / 20 < 1e-3
