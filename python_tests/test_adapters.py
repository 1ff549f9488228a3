"""The adapters of a whole model in one call: add, choose, disable, merge, delete; errors that change nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.nn import lora_layers
from test_nn import BF16
from test_replace import ALL, TOKENS, Model

ATTENTION = [path for path in ALL if "o_proj" not in path]


@pytest.fixture
def model() -> nn.Module:
    """Adapter "policy" in every layer but the head, "reference" in q_proj and v_proj; both say something."""
    model = Model()
    names = {"adapter_name": "policy", "init_lora_weights": False}
    lk.replace_linear(model, r=2, lora_alpha=4, progress=False, **names)
    lk.add_adapter(
        model, "reference", r=3, init_lora_weights=False, target_modules=["q_proj", "v_proj"]
    )
    return model


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    return model(TOKENS)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def state(model: nn.Module) -> dict:
    """All that a failed call must leave as it was."""
    layers = lora_layers(model)
    settings = {
        path: (dict(layer.r), layer.active_adapter, bool(layer._disabled), layer.merged)
        for path, layer in layers.items()
    }
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    return {"settings": settings, "trainable": trainable(model), "tensors": tensors}


def assert_same(after: dict, before: dict) -> None:
    tensors, expected = after.pop("tensors"), before.pop("tensors")
    assert after == before and tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_names_layers_and_parameters(model):
    found = lk.adapters(model)
    assert list(found) == ["policy", "reference"]
    assert list(found["policy"].layers) == ALL and list(found["reference"].layers) == ATTENTION
    layer = model.get_submodule(ALL[0])
    assert found["reference"].layers[ALL[0]] is layer
    assert [p.shape for p in found["reference"].parameters[:2]] == [(3, 64), (64, 3)]
    assert found["reference"].parameters[1] is layer.lora_B["reference"].weight
    elements = sum(3 * (m.in_features + m.out_features) for m in found["reference"].layers.values())
    assert repr(found["reference"]) == f"Adapter(4 layers, {elements} parameters)"


def test_add_by_target_with_all_settings(model):
    lk.add_adapter(
        model, "more", 5, 7.0, 0.25, True, "gaussian", BF16, target_modules=r"layers\.1\.[qo]_proj"
    )
    added = lk.adapters(model)["more"].layers
    assert list(added) == ["layers.1.q_proj", "layers.1.o_proj"]
    for layer in added.values():
        assert (layer.r["more"], layer.lora_alpha["more"], layer.lora_dropout["more"]) == (
            5,
            7,
            0.25,
        )
        assert layer.use_rslora["more"] and layer.lora_A["more"].weight.dtype == BF16
        assert layer.lora_A["more"].weight.any() and not layer.lora_B["more"].weight.any()
        assert layer.active_adapter == "policy"
    lk.add_adapter(model, "more", 1, target_modules=["v_proj"])
    assert lk.adapters(model)["more"].layers["layers.0.v_proj"].r["more"] == 1


def test_the_first_adapter_becomes_active_everywhere(model):
    lk.delete_adapter(model, "policy")
    base = output(model)
    lk.delete_adapter(model, "reference")
    assert lk.adapters(model) == {} and not trainable(model)
    lk.add_adapter(model, "new", init_lora_weights=False, target_modules=["o_proj"])
    assert {layer.active_adapter for layer in lora_layers(model).values()} == {"new"}
    assert trainable(model) == {
        f"layers.{i}.o_proj.lora_{x}.new.weight" for i in (0, 1) for x in "AB"
    }
    assert not torch.equal(output(model), base)
    lk.merge_adapter(model)  # of layers without "new" too


def test_set_adapter_as_call_and_context(model):
    policy = output(model)
    every = trainable(model)
    with lk.set_adapter(model, "reference"):
        reference = output(model)
        assert trainable(model) == {
            f"{path}.lora_{x}.reference.weight" for path in ATTENTION for x in "AB"
        }
        with lk.set_adapter(model, "policy"):
            assert torch.equal(output(model), policy) and trainable(model) == every
        assert torch.equal(output(model), reference)
    assert torch.equal(output(model), policy) and not torch.equal(reference, policy)
    assert trainable(model) == every

    with pytest.raises(KeyError), lk.set_adapter(model, "reference"):
        raise KeyError
    assert trainable(model) == every
    lk.set_adapter(model, "reference")
    assert torch.equal(output(model), reference)


def test_the_end_of_a_context_restores_what_trained(model):
    """Both train, as for AdapterBank.trainable."""
    for adapter in lk.adapters(model).values():
        for parameter in adapter.parameters:
            parameter.requires_grad_(True)
    both = trainable(model)
    with lk.set_adapter(model, "reference"):
        assert trainable(model) < both
    assert trainable(model) == both


def test_disable_adapters_as_call_and_context(model):
    policy = output(model)
    with lk.disable_adapters(model):
        base = output(model)
        with lk.disable_adapters(model):
            pass
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), policy) and not torch.equal(base, policy)
    model.layers[0].q_proj.disable_adapters()
    with lk.disable_adapters(model):
        pass
    assert model.layers[0].q_proj._disabled, "as it was before"
    lk.disable_adapters(model)
    assert torch.equal(output(model), base)
    lk.enable_adapters(model)
    assert torch.equal(output(model), policy)


def test_a_disabled_model_is_its_base_under_a_plan_too(model):
    """The reference of a mixed batch needs no plan of its own."""
    bank = lk.AdapterBank.for_model(model, num_pages=2)
    bank.load("policy")
    bank.load("reference")
    plan = bank.plan(["policy", "reference"], tokens_per_sequence=[TOKENS.shape[1]] * 2)
    with lk.disable_adapters(model):
        base = output(model)
    with bank.using(plan):
        mixed = output(model)
        with lk.disable_adapters(model):
            assert torch.equal(output(model), base)
    assert not torch.equal(mixed, base)


def test_policy_and_reference(model):
    """A step of policy gradient with a penalty: only the policy's adapter gets gradients and moves."""
    before = state(model)["tensors"]
    optimizer = torch.optim.SGD(lk.adapters(model)["policy"].parameters, lr=0.1)
    with torch.no_grad(), lk.set_adapter(model, "reference"):
        reference = model(TOKENS).log_softmax(-1)
    policy = model(TOKENS).log_softmax(-1)
    with torch.no_grad(), lk.disable_adapters(model):
        model(TOKENS)  # between forward and backward
    (reference.exp() * (reference - policy)).sum().backward()
    optimizer.step()
    after = state(model)["tensors"]
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {f"{path}.lora_{x}.policy.weight" for path in ALL for x in "AB"}


def test_merge_and_unmerge(model):
    before, policy = state(model), output(model)
    packed = model.layers[0].q_proj.weight.clone()
    lk.merge_adapter(model)
    assert not torch.equal(model.layers[0].q_proj.weight, packed)
    merged = output(model)
    error = (merged - policy).norm() / policy.norm()
    assert 0 < error < 0.2
    with lk.disable_adapters(model):
        base = output(model)
    assert (base - policy).norm() / policy.norm() > error
    with pytest.raises(RuntimeError, match=r"set_adapter: layers.0.q_proj, .* and 2 more: merged"):
        lk.set_adapter(model, "reference")
    with pytest.raises(RuntimeError, match=r"merge_adapter: .*: merged; call unmerge_adapter"):
        lk.merge_adapter(model)
    with pytest.raises(RuntimeError, match=r"delete_adapter: .*: merged"):
        lk.delete_adapter(model, "policy")
    lk.unmerge_adapter(model)
    assert_same(state(model), before)
    with pytest.raises(RuntimeError, match="unmerge_adapter: nothing is merged"):
        lk.unmerge_adapter(model)


def test_a_failed_merge_changes_nothing(model):
    with torch.no_grad():
        model.layers[1].o_proj.lora_B["policy"].weight[0, 0] = torch.inf
    before = state(model)
    with pytest.raises(ValueError, match=r"^layers\.1\.o_proj: "):
        lk.merge_adapter(model)
    assert_same(state(model), before)
    model.layers[1].o_proj.disable_adapters()
    before = state(model)
    with pytest.raises(RuntimeError, match=r"^layers\.1\.o_proj: merge: adapters are disabled"):
        lk.merge_adapter(model)
    assert_same(state(model), before)


def test_merging_within_set_adapter_is_an_error_at_its_end(model):
    with pytest.raises(RuntimeError, match=r"the end of set_adapter: .*: merged"):
        with lk.set_adapter(model, "reference"):
            lk.merge_adapter(model)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: lk.add_adapter(m, "new", r=0), ValueError, "r: expected an integer >= 1"),
        (lambda m: lk.add_adapter(m, "a.b"), ValueError, "name: expected a non-empty string"),
        (lambda m: lk.add_adapter(m, "new", lora_dropout=1), ValueError, "lora_dropout: "),
        (lambda m: lk.add_adapter(m, "new", adapter_dtype=int), TypeError, "adapter_dtype: "),
        (
            lambda m: lk.add_adapter(m, "reference"),
            ValueError,
            "name: expected a new adapter, got 'reference', which layers.0.q_proj, .* have",
        ),
        (
            lambda m: lk.add_adapter(m, "new", target_modules=["q_proj", "lm_head"]),
            ValueError,
            r"target_modules: 'lm_head' matches no LoRALinear4bit .*layers.0.q_proj, .* and 2 more",
        ),
        (
            lambda m: lk.add_adapter(m, "new", target_modules="q_proj"),
            ValueError,
            "target_modules: 'q_proj' matches no",  # a string must match the whole path
        ),
        (
            lambda m: lk.add_adapter(m, "new", target_modules="("),
            ValueError,
            "target_modules: expected a regular expression",
        ),
        (
            lambda m: lk.add_adapter(m, "new", target_modules=[]),
            ValueError,
            "target_modules: expected at least one name",
        ),
        (
            lambda m: lk.set_adapter(m, "polcy"),
            ValueError,
            r"name: expected one of \['policy', 'reference'\], got 'polcy'",
        ),
        (lambda m: lk.delete_adapter(m, "x"), ValueError, "name: expected one of"),
    ],
)
def test_errors_change_nothing(model, call, error, message):
    before = state(model)
    with pytest.raises(error, match=message):
        call(model)
    assert_same(state(model), before)


@pytest.mark.parametrize(
    "call", [lk.adapters, lk.disable_adapters, lk.enable_adapters, lk.merge_adapter]
)
def test_a_model_without_such_layers(call):
    with pytest.raises(ValueError, match=r"model: expected LoRALinear4bit layers .*got a Model"):
        call(Model())
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        call("model")
