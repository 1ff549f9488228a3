"""The page pool: who owns which page, and that a refused call changes nothing."""

import random

import pytest

import conftest
from lowrank_kernels import backends

if conftest.ONLY_REFERENCE:
    pytest.skip("LOWRANK_BACKEND=reference: needs the native library", allow_module_level=True)

PagePool = backends._host.PagePool


def state(pool):
    """All that can be asked of a pool."""
    slots = pool.loaded_slots
    owned = {slot: (pool.pages(slot), pool.generation(slot), pool.pins(slot)) for slot in slots}
    return pool.num_pages, pool.free_pages, owned


def refused(pool, error, match, call, *args):
    before = state(pool)
    with pytest.raises(error, match=match):
        call(*args)
    assert state(pool) == before


def test_load_gives_pages_and_a_slot():
    pool = PagePool(8)
    assert pool.load(3) == (0, [0, 1, 2])
    assert pool.load(1) == (1, [3])
    assert pool.pages(0) == [0, 1, 2] and pool.pages(1) == [3]
    assert (pool.num_pages, pool.free_pages, pool.loaded_slots) == (8, 4, [0, 1])


@pytest.mark.parametrize("num_pages", [0, -1, 2**31, 2**62])
def test_number_of_pages(num_pages):
    with pytest.raises(ValueError, match=rf"num_pages: expected 1\.\.2147483647, got {num_pages}"):
        PagePool(num_pages)


@pytest.mark.parametrize("pages", [0, -3])
def test_a_load_needs_a_page(pages):
    pool = PagePool(4)
    refused(pool, ValueError, f"pages: expected at least 1, got {pages}", pool.load, pages)


def test_adjacent_pages_are_the_smallest_run_that_is_long_enough():
    pool = PagePool(12)
    for pages in (2, 1, 3, 1, 1, 4):
        pool.load(pages)
    for slot in (0, 2, 4):  # free: 0 1, 3 4 5, 7
        pool.evict(slot)
    assert pool.load(2, adjacent=True)[1] == [0, 1]
    assert pool.load(1, adjacent=True)[1] == [7]
    message = "the page pool has no 2 free pages side by side"
    pool.evict(pool.load(1, adjacent=True)[0])  # 3, and back
    assert sorted(pool.load(3)[1]) == [3, 4, 5]
    pool.evict(1)
    pool.evict(3)  # free: 2 and 6
    refused(pool, RuntimeError, message, pool.load, 2, True)
    refused(pool, RuntimeError, "2 free pages of 12, 3 were asked for", pool.load, 3, True)
    assert sorted(pool.load(2)[1]) == [2, 6]


def test_exhaustion_says_how_much_is_there():
    pool = PagePool(8)
    pool.load(5)
    message = "the page pool has 3 free pages of 8, 4 were asked for"
    refused(pool, RuntimeError, message, pool.load, 4)
    refused(pool, RuntimeError, "3 free pages of 8", pool.load, 2**62)
    pool.load(3)
    refused(pool, RuntimeError, "0 free pages of 8, 1 were asked for", pool.load, 1)


def test_every_page_can_be_an_adapter():
    pool = PagePool(100)
    loaded = [pool.load(1) for _ in range(100)]
    assert sorted(slot for slot, _ in loaded) == list(range(100))
    assert sorted(page for _, [page] in loaded) == list(range(100))


def test_double_free():
    pool = PagePool(4)
    slot, _ = pool.load(2)
    pool.load(1)
    pool.evict(slot)
    refused(pool, ValueError, "slot: expected a loaded slot, got 0", pool.evict, slot)


@pytest.mark.parametrize("slot", [-1, 1, 3, 4, 2**40, -(2**40)])
def test_slots_that_are_not_loaded(slot):
    pool = PagePool(4)
    pool.load(2)
    for call in (pool.evict, pool.pages, pool.generation, pool.pins):
        refused(pool, ValueError, f"slot: expected a loaded slot, got {slot}", call, slot)
    for call in (pool.pin, pool.unpin):
        refused(pool, ValueError, f"slots: expected a loaded slot, got {slot}", call, [0, slot])


def test_pages_and_slots_are_used_again():
    """Even when the free pages lie apart: a load needs a number of them, not a range."""
    pool = PagePool(6)
    slots = [pool.load(1)[0] for _ in range(6)]
    for slot in slots[::2]:
        pool.evict(slot)
    slot, pages = pool.load(3)
    assert sorted(pages) == [0, 2, 4] and slot == slots[4]  # the last one freed
    assert pool.free_pages == 0
    pool.evict(slot)
    assert pool.load(3) == (slot, pages)


def test_no_eviction_while_pinned():
    pool = PagePool(4)
    slot, _ = pool.load(2)
    pool.pin([slot])
    pool.pin([slot, slot])
    for pins in (3, 2, 1):
        assert pool.pins(slot) == pins
        message = rf"slot 0 is in use \(pinned {pins} times\), it cannot be evicted"
        refused(pool, RuntimeError, message, pool.evict, slot)
        pool.unpin([slot])
    pool.evict(slot)
    assert pool.load(1)[0] == slot and pool.pins(slot) == 0


def test_pin_and_unpin_all_or_none():
    pool = PagePool(4)
    a, b = pool.load(1)[0], pool.load(1)[0]
    pool.pin([a, a, b])
    refused(pool, ValueError, "got 2", pool.pin, [a, b, 2])
    refused(pool, ValueError, "pinned as often", pool.unpin, [a, b, a, b])
    refused(pool, ValueError, "got 3", pool.unpin, [a, 3])
    pool.unpin([b, a, a])
    assert pool.pins(a) == pool.pins(b) == 0
    refused(pool, ValueError, "pinned as often", pool.unpin, [a])
    pool.pin([])
    pool.unpin([])


def test_generations_tell_loads_apart():
    pool = PagePool(4)
    a, b = pool.load(1)[0], pool.load(1)[0]
    old = [pool.generation(a), pool.generation(b)]
    assert old[0] != old[1]
    pool.pin([a, b], old)
    pool.unpin([a, b])
    pool.evict(b)
    message = "slot 1 no longer holds the adapter of generation 2: "
    refused(pool, RuntimeError, message + "it is not loaded", pool.pin, [a, b], old)
    assert pool.load(1)[0] == b
    new = [pool.generation(a), pool.generation(b)]
    assert new[0] == old[0] and new[1] not in old
    refused(pool, RuntimeError, message + "it has generation 3", pool.pin, [a, b], old)
    pool.pin([a, b], new)
    assert pool.pins(a) == pool.pins(b) == 1


@pytest.mark.parametrize("slot", [-1, 2, 2**40])
def test_a_generation_for_no_slot(slot):
    pool = PagePool(4)
    pool.load(1)
    refused(pool, RuntimeError, "it is not loaded", pool.pin, [0, slot], [1, 1])


def test_bad_arguments():
    pool = PagePool(4)
    pool.load(1)
    refused(
        pool, ValueError, r"generations: expected one per slot \(1\), got 2", pool.pin, [0], [1, 2]
    )
    refused(pool, TypeError, "slots: expected a sequence of ints, got 0", pool.pin, 0)
    refused(pool, TypeError, r"slots\[1\]: expected an int, got 0\.0", pool.unpin, [0, 0.0])
    refused(
        pool, ValueError, rf"slots\[0\]: expected an int of 64 bits, got {2**63}", pool.pin, [2**63]
    )
    refused(pool, TypeError, "generations", pool.pin, [0], ["1"])
    refused(pool, TypeError, "load", pool.load, 1.0)


class Model:
    """The pool in plain Python: a set of free pages, a dict of loads."""

    def __init__(self, num_pages):
        self.free = set(range(num_pages))
        self.loads = {}  # slot: [pages, generation, pins]
        self.generations = set()

    def load(self, slot, pages, generation):
        assert slot not in self.loads and generation not in self.generations
        assert set(pages) <= self.free and len(set(pages)) == len(pages)
        self.free -= set(pages)
        self.loads[slot] = [pages, generation, 0]
        self.generations.add(generation)

    def evict(self, slot):
        self.free |= set(self.loads.pop(slot)[0])

    def check(self, pool):
        assert state(pool)[1:] == (len(self.free), {s: tuple(l) for s, l in self.loads.items()})
        owned = [page for pages, _, _ in self.loads.values() for page in pages]
        assert sorted([*owned, *self.free]) == list(range(pool.num_pages))


@pytest.mark.parametrize("num_pages", [1, 7, 64])
def test_random_steps(num_pages):
    pool, model = PagePool(num_pages), Model(num_pages)
    pinned = []  # what is to be unpinned, once each
    for _ in range(5000):
        step = random.choice(["load", "load", "evict", "evict", "pin", "unpin"])
        known = [slot for slot in range(num_pages) if slot in model.loads]
        if step == "load":
            pages = random.randint(1, max(1, num_pages // 4))
            if pages > len(model.free):
                message = f"{len(model.free)} free pages of {num_pages}, {pages} were asked for"
                refused(pool, RuntimeError, message, pool.load, pages)
                continue
            slot, got = pool.load(pages)
            assert 0 <= slot < num_pages and len(got) == pages
            model.load(slot, got, pool.generation(slot))
        elif step == "evict":
            slot = random.choice([*known, *known, random.randrange(num_pages)])
            if slot not in model.loads:
                refused(pool, ValueError, f"got {slot}", pool.evict, slot)
            elif model.loads[slot][2]:
                refused(pool, RuntimeError, "in use", pool.evict, slot)
            else:
                pool.evict(slot)
                model.evict(slot)
        elif step == "pin" and known and len(pinned) < 3:
            slots = random.choices(known, k=random.randint(1, 4))
            pool.pin(slots, [model.loads[slot][1] for slot in slots])
            pinned.append(slots)
            for slot in slots:
                model.loads[slot][2] += 1
        elif step == "unpin" and pinned:
            slots = pinned.pop(random.randrange(len(pinned)))
            pool.unpin(slots)
            for slot in slots:
                model.loads[slot][2] -= 1
        model.check(pool)
    assert len(model.generations) > 300
