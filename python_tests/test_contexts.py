"""What holds within a block: plans, adapters, backends. Blocks overlap in any order, in threads and tasks."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
from banks import alone, make_bank, make_model
from lowrank_kernels.multi_lora.plan import active
from tolerance import assert_same_bits

X = torch.randn(2, 64)


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def bank(model):
    return make_bank(model)


def overlap(first, second, between=lambda: None):
    """``first`` and ``second`` are entered in this order and left in the same."""
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    between()
    second.__exit__(None, None, None)


# -- plans -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_two_models_under_two_plans_and_a_third_under_none():
    models = [make_model() for _ in range(3)]
    banks = [make_bank(model) for model in models[:2]]
    bare = models[2](X)
    with banks[0].using(banks[0].plan(["a", "b"])), banks[1].using(banks[1].plan(["b", None])):
        ys = [model(X) for model in models]
        with banks[0].using(banks[0].plan(["c", "c"])):
            inner = models[0](X)
            assert_same_bits("the other bank's plan", models[1](X), ys[1])
        assert_same_bits("the outer plan again", models[0](X), ys[0])
    expected = [
        torch.stack([alone(models[0], name, X)[i] for i, name in enumerate(["a", "b"])]),
        torch.stack([alone(models[1], name, X)[i] for i, name in enumerate(["b", None])]),
        bare,
    ]
    for y, e in zip(ys, expected):
        torch.testing.assert_close(y, e, rtol=0, atol=2e-5)
    torch.testing.assert_close(inner, alone(models[0], "c", X), rtol=0, atol=2e-5)


@torch.no_grad()
def test_plans_that_overlap_in_one_context(model, bank):
    """As generators leave them."""
    first, second = bank.plan(["a", "a"]), bank.plan(["b", "b"])
    seen = []
    overlap(bank.using(first), bank.using(second), lambda: seen.append(active()))
    assert seen == [second] and active() is None
    for name in "abc":
        bank.evict(name)  # nothing is pinned any more


@torch.no_grad()
def test_threads_and_tasks_see_their_own(model, bank):
    expected = {name: alone(model, name, X) for name in "abc"}
    model.up.set_adapter("c")
    model.inner[1].set_adapter("c")
    seen = {}

    async def task(name, pause):
        with bank.using(bank.plan([name] * 2)):
            for step in range(3):
                await asyncio.sleep(pause)
                seen[name, step] = model(X)
            seen[name, "child"] = await asyncio.create_task(child())
            seen[name, "thread"] = await asyncio.to_thread(model, X)

    async def child():
        return model(X)

    async def both():
        await asyncio.gather(task("a", 0.001), task("b", 0.0015))
        seen["c", "after"] = model(X)

    asyncio.run(both())

    def thread(name):
        with bank.using(bank.plan([name] * 2)):
            barrier.wait()
            seen[name, "own thread"] = model(X)
            barrier.wait()

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=thread, args=(name,)) for name in "ab"]
    with bank.using(bank.plan(["b", "b"])):
        new = threading.Thread(target=lambda: seen.update({("c", "new thread"): model(X)}))
        copied = contextvars.copy_context()
        threads += [
            new,
            threading.Thread(target=lambda: seen.update({("b", "copied"): copied.run(model, X)})),
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert len(seen) == 15
    for (name, where), y in seen.items():
        torch.testing.assert_close(y, expected[name], rtol=0, atol=2e-5, msg=f"{name} {where}")


@torch.no_grad()
def test_a_task_that_outlives_the_block_it_began_in_is_told(model, bank):
    async def late():
        await asyncio.sleep(0.01)
        with pytest.raises(RuntimeError, match=r"a block `with bank.using.* that has ended"):
            model(X)
        with bank.using(bank.plan(["a", "b"])):
            model(X)

    async def main():
        with bank.using(bank.plan(["a", "a"])):
            task = asyncio.create_task(late())
        model(X)
        await task

    asyncio.run(main())


def test_update_asks_all_contexts(bank):
    plan = bank.plan(["a", "b"], fixed=True)
    entered, leave = threading.Event(), threading.Event()

    def use():
        with bank.using(plan):
            entered.set()
            leave.wait()

    thread = threading.Thread(target=use)
    thread.start()
    entered.wait()
    with pytest.raises(RuntimeError, match="the plan is in use"):
        plan.update(["b", "a"])
    with pytest.raises(RuntimeError, match="'a' is in a plan in use"):
        bank.evict("a")
    leave.set()
    thread.join()
    plan.update(["b", "a"])
    bank.evict("a")


def test_an_update_between_forward_and_backward_is_an_error(model, bank):
    plan = bank.plan(["a", "b"], fixed=True)
    with bank.using(plan):
        y = model(X.clone().requires_grad_())
    plan.update(["b", "a"])
    with pytest.raises(RuntimeError, match=r"expected the backward before Plan.update"):
        y.sum().backward()


# -- which rows a layer sees --------------------------------------------------------------------------


@torch.no_grad()
def test_a_decode_step_is_known_by_its_shape(model, bank):
    plan = bank.plan(["a", "b"], [3, 3])
    x = torch.randn(2, 1, 64)
    with bank.using(plan):
        y = model(x)
        for rows in (x[:, 0], x.transpose(0, 1), torch.randn(1, 2, 64), torch.randn(2, 2, 64)):
            with pytest.raises(ValueError, match=r"expected 6 rows.*\[2, 1, K\].*make the plan of"):
                model(rows)
    for i, name in enumerate("ab"):
        torch.testing.assert_close(y[i], alone(model, name, x[i]), rtol=0, atol=2e-5)


@torch.no_grad()
def test_layers_of_routed_experts_are_refused():
    """Even where they happen to see as many rows as the plan has: their order is not the batch's."""

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.Linear(64, 64)
            self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
            self.shared_experts = nn.Linear(64, 64)

        def forward(self, x):
            x = self.shared_experts(self.attention(x))
            return x + self.experts[0](x.flip(0)).flip(0)

    model = Routed()
    lk.replace_linear(model, adapter_name="a", r=2, init_lora_weights=False, progress=False)
    bank = lk.AdapterBank.for_model(model, 4)
    bank.load("a")
    x = torch.randn(4, 64)
    with bank.using(bank.plan(["a", None], [2, 2])):
        with pytest.raises(ValueError, match="expected no adapter of routed experts"):
            model(x)
    with bank.using(bank.plan([None, None], [2, 2])):
        base = model(x)
    key = "attention.lora_{}.weight"
    attention = {key.format("A"): torch.randn(2, 64), key.format("B"): torch.randn(64, 2)}
    bank.load("attention", attention)
    with bank.using(bank.plan([None, "attention"], [2, 2])):
        y = model(x)
    assert_same_bits("rows without adapter", y[:2], base[:2])
    assert not torch.allclose(y[2:], base[2:])


# -- adapters of a model ------------------------------------------------------------------------------


def test_set_adapter_and_disable_adapters_overlap(model):
    lk.set_adapter(model, "a")
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    names = []
    overlap(
        lk.set_adapter(model, "b"),
        lk.set_adapter(model, "c"),
        lambda: names.append(model.up.active_adapter),
    )
    assert names == ["c"] and model.up.active_adapter == "a"
    assert before == {n: p.requires_grad for n, p in model.named_parameters()}
    y, disabled = model(X), []
    overlap(
        lk.disable_adapters(model),
        lk.disable_adapters(model),
        lambda: disabled.append(torch.equal(model(X), y)),
    )
    assert disabled == [False] and torch.equal(model(X), y)


def test_set_adapter_of_a_part_overlaps_that_of_the_whole(model):
    lk.set_adapter(model, "a")
    overlap(lk.set_adapter(model, "b"), lk.set_adapter(model.inner, "c"))
    assert model.up.active_adapter == model.inner[1].active_adapter == "a"
    with lk.set_adapter(model, "b"):
        lk.set_adapter(model, "c")
    assert model.up.active_adapter == "a"


# -- the whole process --------------------------------------------------------------------------------


@pytest.mark.skipif(len(lk.backends.isas()) < 2, reason="this CPU has one instruction set")
def test_the_last_request_still_in_force_counts():
    best, seen = lk.backends.isa(), []
    overlap(
        lk.backends.use_isa("scalar"),
        lk.backends.use_isa(best),
        lambda: seen.append(lk.backends.isa()),
    )
    outer = lk.backends.use_isa(best)
    outer.__enter__()
    overlap(lk.backends.use_isa("scalar"), lk.backends.use_isa("scalar"))
    seen.append(lk.backends.isa())
    outer.__exit__(None, None, None)
    assert seen == [best, best] and lk.backends.isa() == best
    with pytest.raises(ValueError, match="expected a known ISA"), lk.backends.use_isa("none"):
        pass
    assert lk.backends.isa() == best


def test_backends_kernels_and_invariance_overlap():
    active, seen = lk.backends.active(), []
    overlap(
        lk.backends.use("reference"),
        lk.backends.use("cpu"),
        lambda: seen.append(lk.backends.active()),
    )
    assert seen == ["cpu"] and lk.backends.active() == active
    overlap(
        lk.backends.use_kernel("gemm"),
        lk.batch_invariant(),
        lambda: seen.append(lk.backends.report()["kernel"]),
    )
    assert seen[1] == "invariant" and lk.backends.report()["kernel"] is None


@pytest.mark.skipif(lk.backends.report()["int8"] is None, reason="this CPU has no int8 kernels")
def test_int8_activations_overlap():
    w, x = lk.quantize_4bit(torch.randn(8, 64)), torch.randn(3, 64)
    exact, seen = lk.linear_4bit(x, w), []
    overlap(
        lk.int8_activations(),
        lk.int8_activations(),
        lambda: seen.append(torch.equal(lk.linear_4bit(x, w), exact)),
    )
    assert seen == [False] and torch.equal(lk.linear_4bit(x, w), exact)
    block, errors = lk.int8_activations(), []
    block.__enter__()

    def leave():
        try:
            block.__exit__(None, None, None)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "in the thread that entered it" in errors[0]
    assert not torch.equal(lk.linear_4bit(x, w), exact)
    lk.int8.state.blocks, lk.int8.state.active = 0, False
    lk.backends.host_module().int8_set(False)
