"""Linear4bit under real PEFT, without registration: forward, gradients, variants, what is refused, torch features."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lk
import tolerance
from lowrank_kernels.interop import peft_layer
from peft_models import (
    PeftLinear4bit,
    add,
    assert_near,
    assert_same_packed,
    base,
    layers,
    packed,
    pair,
    peft,
    wrapped,
)
from tolerance import assert_same_bits

X = (5, 7, 64)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (model(x) * torch.linspace(-1, 1, 10)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    a, b = gradients(ours, x), gradients(theirs, x)
    assert a and a.keys() == b.keys()
    for name in a:
        assert_near(a[name], b[name])


@pytest.fixture
def fused(monkeypatch) -> list[str]:
    """The names of the fused functions, as often as they are called."""
    calls = []
    for name in ("lora_linear_4bit", "linear_4bit", "mixed_batch"):
        function = getattr(peft_layer, name)
        monkeypatch.setattr(
            peft_layer, name, lambda *a, n=name, f=function: (calls.append(n), f(*a))[1]
        )
    return calls


@pytest.mark.parametrize("first", ["peft", "lowrank_kernels"])
def test_nobody_has_to_register(first):
    """Whichever is imported first; and importing us does not import PEFT."""
    code = f"""
import sys, {first}
assert {first!r} == "peft" or "peft" not in sys.modules
import lowrank_kernels as lk, peft, torch
model = torch.nn.Sequential(torch.nn.Linear(64, 8))
lk.replace_linear(model, r=0, progress=False)
model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
print(type(model.base_model.model[0]).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "PeftLinear4bit"


def test_layers_of_others_and_of_users_are_left_to_them():
    class Own(peft.tuners.lora.Linear):
        pass

    config = peft.LoraConfig(target_modules="all-linear")
    config._register_custom_module({lk.Linear4bit: Own})
    model = peft.get_peft_model(base(), config).base_model.model
    assert type(model.up) is Own and type(model.lm_head) is peft.tuners.lora.Linear
    assert not isinstance(wrapped(nn.Sequential(base(), nn.Linear(8, 8)), target_modules="1"), Own)


# -- forward ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, adapter_dtype", [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32)]
)
def test_the_forward_keeps_the_bound(dtype, adapter_dtype, fused):
    """Against float64 on the same weights, and in 16 bits no worse than PEFT's own forward, which rounds
    every step; in float32 that one is as exact as the sgemm of this CPU happens to be."""
    for layer in layers(wrapped(base(dtype))):
        assert layer.lora_A["default"].weight.dtype == F32  # PEFT's default, whatever the base
        A, B = (part["default"].to(adapter_dtype).weight for part in (layer.lora_A, layer.lora_B))
        x = torch.randn(9, 3, layer.in_features, dtype=dtype)
        base_layer = layer.base_layer
        bias, scaling = base_layer.bias, layer.scaling["default"]
        args = (x.flatten(0, 1), base_layer.dequantize(F32), A, B, scaling, bias, 0.0, None)
        (exact, _), (magnitude, _) = tolerance.evaluate("lora_linear", args)
        fused.clear()
        ours, theirs = (
            forward(layer, x).flatten(0, 1)
            for forward in (type(layer).forward, peft.tuners.lora.Linear.forward)
        )
        assert fused == ["lora_linear_4bit"] and ours.dtype == theirs.dtype == dtype
        extra = tolerance.operand_rounding(args[0], magnitude)
        tolerance.assert_close("y", ours, exact, magnitude, extra=extra)
        assert dtype == F32 or (ours - exact).norm() <= (theirs - exact).norm()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"up": 3}, "alpha_pattern": {"1": 5}},
        {"lora_bias": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
    ],
    ids=str,
)
def test_output_and_gradients_are_those_of_peft_on_dense_layers(config):
    ours, theirs = pair(r=4, **config)
    assert len(layers(ours)) == 2
    before, x = packed(ours), torch.randn(X)
    assert_near(ours(x), theirs(x))
    assert_same_gradients(ours, theirs, x)
    assert_same_packed(ours, before)


@pytest.mark.parametrize("lora_bias", [False, True])
def test_several_active_adapters(lora_bias, fused):
    models = pair(r=4, lora_bias=lora_bias)
    add(models, "b", r=6, lora_bias=lora_bias, lora_alpha=7)
    add(models, "c", r=2, target_modules=["up"])
    for model in models:
        model.base_model.set_adapter(["default", "b", "c"])
    x = torch.randn(X)
    assert_near(models[0](x), models[1](x))
    assert fused == ["lora_linear_4bit"] * 2
    assert_same_gradients(*models, x)


def test_dropout_of_one_and_of_several_adapters(fused):
    model = wrapped(r=4, lora_dropout=0.5)
    model.add_adapter(
        "b", peft.LoraConfig(target_modules=["up"], r=4, lora_dropout=0.25, init_lora_weights=False)
    )
    layer, x = layers(model)[0], torch.randn(4000, 64)
    alone = [layer.base_layer(x)]
    for names in (["default"], ["b"], ["default", "b"]):
        layer.set_adapter(names)
        layer.eval()
        expected, seen = layer(x), []
        layer.train()
        for _ in range(2):
            torch.manual_seed(3)
            seen.append(layer(x))
        assert_same_bits("y", *seen)
        assert not torch.equal(seen[0], layer(x))
        # Dropping is unbiased: the mean over the rows is near that without.
        difference = (seen[0] - expected).mean(0).abs().max()
        assert 0 < difference < 0.1 * (expected - alone[0]).abs().max()
    assert set(fused) == {"lora_linear_4bit"}


def test_disabled_and_inactive_are_the_base(fused):
    model, x = wrapped(), torch.randn(X)
    model.add_adapter("b", peft.LoraConfig(target_modules=["inner.1"], init_lora_weights=False))
    layer = layers(model)[0]
    expected = layer.base_layer(x)
    with model.disable_adapter():
        assert_same_bits("y", layer(x), expected)
    assert not torch.equal(layer(x), expected)
    model.set_adapter("b")
    assert_same_bits("y", layer(x), expected)
    assert fused == ["lora_linear_4bit", "linear_4bit"]


def test_hooks_are_not_passed_over(fused):
    """Hooks of the base layer and of A, and a forward that accelerate put in place, run."""
    layer, x = layers(wrapped())[0], torch.randn(X)
    expected, seen = layer(x), []
    fused.clear()
    for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        handle = module.register_forward_hook(lambda *_: seen.append(1))
        assert_near(layer(x), expected)
        handle.remove()
    forward = layer.base_layer.forward
    layer.base_layer.forward = lambda x: (seen.append(1), forward(x))[1]
    assert_near(layer(x), expected)
    del layer.base_layer.forward
    assert len(seen) == 4 and not fused
    layer(x)
    assert fused == ["lora_linear_4bit"]


# -- variants, initialisation, what is refused ------------------------------------------------------


def test_alora_acts_from_its_offset_on():
    layer, x = layers(wrapped(alora_invocation_tokens=[1, 2]))[0], torch.randn(X)
    y = layer(x, alora_offsets=[None, 1, 2, 3, 7])
    changed = (y != layer.base_layer(x)).any(-1).sum(1)
    assert changed.tolist() == [0, 1, 2, 3, 7]
    y.sum().backward()
    assert layer.lora_A["default"].weight.grad.norm() > 0


def test_variants_that_need_no_base_weight_train():
    config = lora_config("MontecloraConfig")
    if config is None:
        pytest.skip("this version of PEFT has no such variant")
    model = wrapped(monteclora_config=config).train()
    model(torch.randn(X)).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "Gaussian"])
def test_initialisations_that_keep_the_base(init):
    model = base(BF16)
    before, x = packed(model), torch.randn(X, dtype=BF16)
    plain = model(x)
    model = wrapped(model, init_lora_weights=init, r=4)
    A, B = layers(model)[0].lora_A["default"].weight, layers(model)[0].lora_B["default"].weight
    assert A.dtype == B.dtype == F32 and A.any()
    assert B.any() == (init == "orthogonal")
    assert torch.allclose(model(x), plain, atol=0.1)  # orthogonal: B A is tiny, not zero
    assert_same_packed(model, before)


def test_eva():
    config = {"init_lora_weights": "eva", "r": 4, "eva_config": peft.EvaConfig(rho=1.0)}
    model = wrapped(**config)
    before, batches = packed(model), [{"x": torch.randn(64, 64)} for _ in range(2)]
    peft.initialize_lora_eva_weights(
        model,
        batches,
        forward_fn=lambda model, batch: model(batch["x"]),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda layer_input, *_: layer_input[0],
        show_progress_bar=False,
    )
    A = layers(model)[0].lora_A["default"].weight
    assert_near(A @ A.T, torch.eye(4))  # right singular vectors
    assert_same_packed(model, before)


def lora_config(name: str, **arguments) -> object:
    """A configuration of a variant; None, which skips the test, in versions of PEFT without it."""
    kind = getattr(peft.tuners.lora.config, name, None)
    return kind and kind(**arguments)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights: .* got 'pissa', which changes"),
        ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights: .* got 'pissa_niter_2'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: .* got 'olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights: .* got 'corda'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights: .* got 'lora_ga'"),
        ({"kasa_config": lora_config("KasaConfig")}, "kasa_config: expected it unset"),
        ({"use_qalora": True}, "use_qalora: expected it unset"),
        (
            {"target_modules": [], "target_parameters": ["up.weight"]},
            "target_parameters: expected dense parameters, got 'weight'",
        ),
    ],
)
def test_what_needs_a_dense_base_is_refused(config, message):
    if None in config.values():
        pytest.skip("this version of PEFT has no such variant")
    model = base()
    before = packed(model)
    with pytest.raises(ValueError, match=message):
        wrapped(model, **config)
    assert_same_packed(model, before)


def test_a_second_adapter_that_is_refused():
    model = wrapped()
    with pytest.raises(ValueError, match=r"init_lora_weights: .* got 'olora'"):
        add([model], "b", init_lora_weights="olora")


def test_layers_that_cannot_be_targets():
    model = base()
    with pytest.raises(TypeError, match=r"modules_to_save: .* got Linear4bit in 4 bits"):
        wrapped(model, target_modules=["up"], modules_to_save=["inner.1"])
    with pytest.raises(TypeError, match=r"modules_to_save: .* got Sequential in 4 bits"):
        wrapped(model, target_modules=["up"], modules_to_save=["inner"])
    own = base()
    lk.replace_linear(own, r=4, progress=False)
    with pytest.raises(ValueError, match=r"got a LoRALinear4bit, which has adapters .*default"):
        wrapped(own, target_modules="all-linear")


def test_fan_in_fan_out_is_reset_with_a_warning():
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = wrapped(fan_in_fan_out=True)
    assert not layers(model)[0].fan_in_fan_out


# -- torch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "active", [["default"], pytest.param(["default", "b"], marks=pytest.mark.slow)]
)
def test_compile_without_a_graph_break(active):
    model = wrapped(r=4)
    model.add_adapter("b", peft.LoraConfig(target_modules=["up"], r=2, init_lora_weights=False))
    model.base_model.set_adapter(active)
    x = torch.randn(X)
    expected, grads = model(x), gradients(model, x)
    compiled = torch.compile(model, fullgraph=True)
    assert_near(compiled(x), expected)
    for name, gradient in gradients(compiled, x).items():
        assert_near(gradient, grads[name.removeprefix("_orig_mod.")])
    with torch.no_grad():
        assert_near(compiled(x), expected)


def test_autocast():
    model, x = wrapped(), torch.randn(X)
    layer = layers(model)[0]
    with torch.autocast("cpu", BF16):
        y = layer(x)
        theirs = peft.tuners.lora.Linear.forward(layer, x)
    assert y.dtype == theirs.dtype == BF16
    assert torch.allclose(y, layer(x).to(BF16), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    model = wrapped(lora_dropout=0.5).train()
    layer, x = layers(model)[0], torch.randn(X, requires_grad=True)
    results = []
    for forward in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(0)
        forward(x).sum().backward()
        A = layer.lora_A["default"].weight
        results.append((x.grad.clone(), A.grad.clone()))
        x.grad = A.grad = None
    for a, b in zip(*results, strict=True):
        assert_same_bits("y", a, b)


def test_copies_and_pickles():
    model, x = wrapped().eval(), torch.randn(X)
    names = ["__base__", *["default"] * 4]
    expected, mixed = model(x), model(x, adapter_names=names)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits("y", copied(x), expected)
        with torch.no_grad():  # the copy has pages of its own
            for layer in layers(copied):
                layer.lora_B["default"].weight.zero_()
        assert not torch.equal(copied(x, adapter_names=names), mixed)
        assert_same_bits("y", model(x, adapter_names=names), mixed)


def test_inference_mode():
    model, x = wrapped().eval(), torch.randn(X)
    with torch.inference_mode():
        y = model(x)
    assert_same_bits("y", y.clone(), model(x))
    assert isinstance(layers(model)[0], PeftLinear4bit)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("change", ["set_adapter", "disable", "eval", "adapter_names"])
def test_checkpointing_under_another_state_is_an_error(use_reentrant, change):
    """PEFT's own layers take other adapters, in silence, when they run again in backward."""
    model = wrapped(lora_dropout=0.5)
    add([model], "b", r=4)
    x = torch.randn(3, 64, requires_grad=True)

    def loss(**keywords):
        y = checkpoint(lambda x: model(x, **keywords), x, use_reentrant=use_reentrant)
        return y.square().sum()

    loss().backward()
    if change == "adapter_names":
        model.eval()
        # The names are in hooks, which are there during the forward of the model alone.
        tuner = model.base_model.model
        model.base_model.model.forward = lambda x: checkpoint(
            type(tuner).forward, tuner, x, use_reentrant=use_reentrant
        )
        y = model(x, adapter_names=["default", "b", "b"]).square().sum()
        with pytest.raises(RuntimeError, match="with the state of the forward"):
            y.backward()
        return
    y = loss()
    if change == "set_adapter":
        model.set_adapter("b")
    elif change == "disable":
        model.base_model.disable_adapter_layers()
    else:
        model.eval()
    with pytest.raises(RuntimeError, match="with the state of the forward"):
        y.backward()
