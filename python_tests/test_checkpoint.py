"""``torch.utils.checkpoint``: what runs again in backward runs as it did in forward, or says that it cannot."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import lowrank_kernels as lk
from banks import make_bank, make_model
from tolerance import assert_same_bits

both_kinds = pytest.mark.parametrize("use_reentrant", [False, True])


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def bank(model):
    bank = make_bank(model)
    bank.trainable("a", "b", "c")
    return bank


def gradients(bank, run, forward, backward):
    parameters = [p for pages in "abc" for p in bank.trainable("a", "b", "c")]
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for p in parameters:
        p.grad = None
    with forward:
        y = run(x)
    with backward:
        y.square().sum().backward()
    return [
        x.grad,
        *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters),
    ]


@both_kinds
@pytest.mark.parametrize("backward", ["none", "same", "other", "other bank"])
@pytest.mark.parametrize("offload", [False, True])
def test_the_plan_of_the_forward(model, bank, use_reentrant, backward, offload):
    forward = bank.plan(["a", "b", None, "a"])
    other = make_bank(make_model())

    def backwards():
        if backward == "none":
            return contextlib.nullcontext()
        if backward == "other bank":
            return other.using(other.plan(["b"] * 4))
        return bank.using(forward if backward == "same" else bank.plan(["c"] * 4))

    def run(x):
        with torch.autograd.graph.save_on_cpu() if offload else contextlib.nullcontext():
            return checkpoint(model, x, use_reentrant=use_reentrant)

    want = gradients(bank, model, bank.using(forward), contextlib.nullcontext())
    got = gradients(bank, run, bank.using(forward), backwards())
    assert_same_bits(backward, got, want)


@both_kinds
def test_nested_and_in_sequence(model, bank, use_reentrant):
    plan = bank.plan(["a", "b", "c", None])

    def inner(x):
        return checkpoint(model, x, use_reentrant=use_reentrant)[:, :1] * torch.ones(64)

    def run(x):
        return checkpoint(lambda x: inner(inner(x)), x, use_reentrant=use_reentrant)

    def plain(x):
        for _ in range(2):
            x = model(x)[:, :1] * torch.ones(64)
        return x

    want = gradients(bank, plain, bank.using(plan), contextlib.nullcontext())
    got = gradients(bank, run, bank.using(plan), bank.using(bank.plan(["c"] * 4)))
    assert_same_bits("nested", got, want)
    parts = nn.Sequential(model.up, model.inner, nn.Tanh())

    def sequence(x):
        return checkpoint_sequential(parts, 2, x, use_reentrant=use_reentrant)

    want = gradients(bank, parts, bank.using(plan), contextlib.nullcontext())
    got = gradients(bank, sequence, bank.using(plan), contextlib.nullcontext())
    assert_same_bits("in sequence", got, want)


@both_kinds
def test_what_cannot_be_put_back_is_an_error(model, bank, use_reentrant):
    fixed = bank.plan(["a", "b", None, "a"], fixed=True)
    x = torch.randn(4, 64, requires_grad=True)
    with bank.using(fixed):
        y = checkpoint(model, x, use_reentrant=use_reentrant)
    fixed.update(["b"] * 4)
    with pytest.raises(RuntimeError, match=r"expected the backward before Plan.update"):
        y.sum().backward()
    with bank.using(bank.plan(["a"] * 4)):
        y = checkpoint(model, x, use_reentrant=use_reentrant)
    bank.evict("a")
    with pytest.raises(RuntimeError, match="has been evicted since the plan was made"):
        y.sum().backward()


CHANGES = {
    "another adapter": lambda model: lk.set_adapter(model, "b"),
    "disabled": lk.disable_adapters,
    "merged": lk.merge_adapter,
    "no dropout": lambda model: model.eval(),
}


@both_kinds
@pytest.mark.parametrize("change", CHANGES)
def test_another_state_of_the_layers_is_an_error(use_reentrant, change):
    model = make_model()
    for layer in (model.up, model.inner[1]):
        layer.lora_dropout["a"] = 0.5
    lk.set_adapter(model, "a")
    x = torch.randn(4, 64, requires_grad=True)
    y = checkpoint(model, x, use_reentrant=use_reentrant)
    CHANGES[change](model)
    with pytest.raises(RuntimeError, match="expected a backward with the state of the forward"):
        y.sum().backward()


@both_kinds
def test_a_state_that_comes_back_is_right(use_reentrant):
    """A reference without adapters between forward and backward, and two adapters in one function."""
    model = make_model()
    lk.set_adapter(model, "a")

    def twice(x):
        y = model(x)
        with lk.disable_adapters(model):
            return y + model(x)

    results = []
    for run in (twice, lambda x: checkpoint(twice, x, use_reentrant=use_reentrant)):
        model.zero_grad()
        x = torch.ones(4, 64, requires_grad=True)
        y = run(x)
        with torch.no_grad(), lk.disable_adapters(model):
            model(x)
        with torch.no_grad(), lk.set_adapter(model, "b"):
            model(x)
        y.square().sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) > 4
    assert_same_bits("checkpointed", results[1], results[0])
