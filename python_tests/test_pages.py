"""Adapters that live in their pages: the model's parameters are views of them, and everything else works as before."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lowrank_kernels as lk
from banks import RANKS, alone, layers, make_bank, make_model
from lowrank_kernels.multi_lora.pages import ModulePages, home_of
from lowrank_kernels.multi_lora.plan import PageTable
from tolerance import assert_same_bits

X = torch.randn(3, 64)
NAMES = ["a", None, "b"]


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def bank(model):
    return make_bank(model)


def adapters(model, names=RANKS):
    return [p for l in layers(model).values() for n in names for p in l.adapter_parameters(n)]


def mixed(model, bank, names=NAMES):
    with bank.using(bank.plan(names)):
        return model(X)


def assert_right(model, bank, names=NAMES):
    y = mixed(model, bank, names)
    for i, name in enumerate(names):
        torch.testing.assert_close(y[i], alone(model, name, X[i]), rtol=0, atol=2e-5)


def addresses(parameters):
    return [p.data_ptr() for p in parameters]


def test_parameters_stay_the_same_objects_with_the_same_values(model):
    parameters = adapters(model)
    values, own = [p.detach().clone() for p in parameters], addresses(parameters)
    bank = make_bank(model)
    assert all(p is q for p, q in zip(parameters, adapters(model)))
    assert_same_bits("values", parameters, values)
    inside = {t.untyped_storage().data_ptr() for m in bank.module_names for t in bank[m].args[:2]}
    assert {p.untyped_storage().data_ptr() for p in parameters} <= inside
    assert all(home_of(p) is not None for p in parameters)
    for name in RANKS:
        bank.evict(name)
    assert_same_bits("values", parameters, values)
    assert all(p.is_contiguous() and home_of(p) is None for p in parameters)
    assert not {p.untyped_storage().data_ptr() for p in parameters} & inside and own


def test_training_needs_no_copy(model, bank, monkeypatch):
    """Steps of an optimizer, in place, by several implementations; the same bits as adapters of their own memory."""
    for options in ({"foreach": True}, {"foreach": False}, {"fused": True}):
        other = copy.deepcopy(model)
        assert all(p.is_contiguous() for p in other.parameters())
        others = make_bank(other)
        others.trainable("a", "b")
        outside = copy.deepcopy(other)
        parameters = others.trainable("a", "b")
        optimizer = torch.optim.AdamW(parameters, lr=0.1, **options)
        home = addresses(parameters)
        moves = []
        monkeypatch.setattr(ModulePages, "_move_in", lambda *_, m=moves: m.append(1))
        for _ in range(3):
            optimizer.zero_grad()
            mixed(other, others).square().sum().backward()
            optimizer.step()
        monkeypatch.undo()
        assert addresses(parameters) == home and not moves
        assert_right(other, others)
        assert not torch.equal(mixed(other, others)[0], alone(outside, "a", X[0]))


def test_state_dicts_copies_and_pickles_are_plain(model, bank, tmp_path):
    expected = mixed(model, bank)
    plain = dict(make_model().state_dict())
    state = model.state_dict()
    assert list(state) == list(plain)
    for key, tensor in state.items():
        if ".lora_" in key:
            assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    save_file(state, tmp_path / "model.safetensors")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for p, q in zip(adapters(copied), adapters(model)):
            assert torch.equal(p, q) and p.requires_grad == q.requires_grad
            assert p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes
        new = make_bank(copied)
        assert_same_bits("copied", mixed(copied, new), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert all(torch.equal(p, q) for p, q in zip(adapters(loaded), adapters(model)))
    single = io.BytesIO()
    torch.save(model.up.lora_B["c"].weight, single)
    assert len(single.getvalue()) < 4096 < bank["up"].B.nbytes
    both = copy.deepcopy([model.up.lora_A["a"].weight, model.up.lora_A["a"].weight])
    assert both[0] is both[1]
    lk.save_adapter(model, tmp_path / "a", "a")
    bank.load("a again", tmp_path / "a")
    y = mixed(model, bank, ["a", "a again", "a again"])
    torch.testing.assert_close(y, mixed(model, bank, ["a", "a", "a"]), rtol=0, atol=0)


def test_loading_a_state_dict_writes_into_the_pages(model, bank):
    parameters = adapters(model)
    home = addresses(parameters)
    state = {k: v * 2 if "lora_B" in k else v for k, v in model.state_dict().items()}
    before = mixed(model, bank)
    model.load_state_dict(state)
    assert addresses(parameters) == home
    assert not torch.equal(mixed(model, bank), before)
    assert_right(model, bank)


def replace_data(parameter):
    parameter.data = parameter.data * 2


def replace_parameter(module, name):
    module.weight = nn.Parameter(module.weight.detach() * 2)


REPLACED = {
    "data": lambda model: [replace_data(p) for p in adapters(model)],
    "parameter": lambda model: [
        replace_parameter(part[n], n)
        for layer in layers(model).values()
        for part in (layer.lora_A, layer.lora_B)
        for n in RANKS
    ],
    "assign": lambda model: model.load_state_dict(
        {k: v * 2 if ".lora_" in k else v for k, v in model.state_dict().items()}, assign=True
    ),
    "there and back": lambda model: model.bfloat16().float(),
}


@pytest.mark.parametrize("how", REPLACED)
@pytest.mark.parametrize("within", [False, True])
def test_parameters_that_were_replaced_move_in_again(model, bank, how, within):
    plan = bank.plan(NAMES)
    old = adapters(model)
    if within:
        with bank.using(plan):
            REPLACED[how](model)
            y = model(X)
    else:
        REPLACED[how](model)
        with bank.using(plan):
            y = model(X)
    for i, name in enumerate(NAMES):
        torch.testing.assert_close(y[i], alone(model, name, X[i]), rtol=0, atol=2e-5)
    used = adapters(model, ["a", "b"])
    assert all(home_of(p) is not None for p in used)
    gone = [p for p in old if not any(p is q for q in adapters(model))]
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in gone if home_of(p) is None)
    y = mixed(model, bank)
    y.sum().backward()


def test_what_does_not_fit_is_refused_in_words(model, bank):
    model.up.lora_A["a"].bfloat16()
    with pytest.raises(
        RuntimeError, match=r"expected a parameter in torch.float32 .* got torch.bfloat16"
    ):
        mixed(model, bank)
    model.up.lora_A["a"].float()
    model.up.lora_B["a"].weight = nn.Parameter(torch.zeros(96, 5))
    with pytest.raises(RuntimeError, match=r"B .*shape \(96, 4\), got \(96, 5\); evict"):
        mixed(model, bank)
    bank.evict("a")
    with pytest.raises(ValueError, match="expected loaded adapters"):
        mixed(model, bank)


def test_functional_call_leaves_the_models_own_values(model, bank):
    """Other parameters take the places for a while."""
    other = make_model()
    before = mixed(model, bank)
    values = [p.detach().clone() for p in adapters(model)]
    theirs = dict(other.named_parameters()) | dict(other.named_buffers())
    with bank.using(bank.plan(NAMES)):
        y = torch.func.functional_call(model, theirs, (X,))
    state = {n: p for n, p in other.named_parameters() if ".lora_" in n}
    own = copy.deepcopy(other)
    assert_same_bits("theirs", y, mixed(own, make_bank(own)))
    assert_same_bits("ours", mixed(model, bank), before)
    assert_same_bits("values", adapters(model), values)
    assert_same_bits("their values", list(state.values()), [other.get_parameter(n) for n in state])
    plain = {n: p.detach() for n, p in theirs.items()}
    with bank.using(bank.plan(NAMES)), pytest.raises(RuntimeError, match="a parameter, got Tensor"):
        torch.func.functional_call(model, plain, (X,))


def test_backward_finds_what_forward_read(model, bank):
    bank.trainable("a")
    x = X.clone().requires_grad_()
    for change in ("step", "frozen", "replaced"):
        with bank.using(bank.plan(NAMES)):
            y = model(x)
            if change == "replaced":
                replace_data(model.up.lora_A["a"].weight)
                model(x)
            else:
                with torch.no_grad():
                    model.up.lora_A["a" if change == "step" else "b"].weight.mul_(2)
            with pytest.raises(
                RuntimeError, match=r"modified by an inplace operation|took their place"
            ):
                y.sum().backward()


def test_an_adapter_lives_in_one_bank(model):
    bank = make_bank(model)
    other = lk.AdapterBank.for_model(model, 12)
    with pytest.raises(
        RuntimeError, match="own adapter 'a' lives in another AdapterBank; evict it"
    ):
        other.load("a")
    assert other.free_pages == 12 and other.adapters == ()
    bank.evict("a")
    other.load("a")
    assert_right(model, other, ["a", None, "a"])
    values = [p.detach().clone() for p in adapters(model)]
    del bank
    del other
    gc.collect()
    third = make_bank(model)  # the others are gone
    assert_same_bits("values", adapters(model), values)
    assert_right(model, third)


def test_pages_side_by_side(model):
    bank = lk.AdapterBank.for_model(model, num_pages=5)
    key = "up.lora_{}.weight"
    one = {key.format("A"): torch.randn(4, 64), key.format("B"): torch.randn(96, 4)}
    for name in "vwxyz":
        bank.load(name, one)
    for name in "wy":
        bank.evict(name)
    with pytest.raises(
        RuntimeError, match=r"'b' of rank 20 needs 3 adjacent pages.*2 of 5 are free; evict"
    ):
        bank.load("b")
    bank.evict("v")
    with pytest.raises(RuntimeError, match=r"3 of 5 are free, but not side by side; evict"):
        bank.load("b")
    two = lk.AdapterBank.for_model(model, num_pages=5)
    del bank
    two.load("b")
    assert two.pool.pages(two.slot("b")) == [0, 1, 2]
    two.load("a")
    two.load("c")
    assert two.free_pages == 0
    assert_right(model, two, ["b", "a", "c"])


def test_pages_need_no_layer():
    """What an engine brings: a table, the module's sizes, and an owner with one method."""

    class Engine:
        def __init__(self):
            self.A, self.B = nn.Parameter(torch.randn(5, 32)), nn.Parameter(torch.randn(16, 5))

        def adapter(self, slot):
            return self.A, self.B

    table = PageTable(3, 8, torch.device("cpu"))
    table.dtype = torch.float32
    engine = Engine()
    pages = ModulePages(table, 16, 32, engine)
    slot, ids = table.take_pages("own", 5, adjacent=True)
    table.name_slot("own", slot, 5)
    pages.describe(slot, 5, 2.0, 0.0)
    pages.adopt(slot, ids[0])
    A, B = torch.randn(9, 32), torch.randn(16, 9)
    copied, ids = table.take_pages("copied", 9)
    table.name_slot("copied", copied, 9)
    pages.describe(copied, 9, 0.5, 0.0)
    pages.fill(ids, A, B)
    x = torch.randn(2, 32)
    y = lk.multi_lora_(torch.zeros(2, 16), x, table.plan(["own", "copied"]), pages)
    y.sum().backward()
    expected = torch.stack([2.0 * engine.B @ (engine.A @ x[0]), 0.5 * B @ (A @ x[1])])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    assert engine.A.grad is not None and engine.B.grad.shape == (16, 5)
