"""Merging, files and the rest of PEFT's interface on Linear4bit layers, with the real PEFT."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.formats import quantize_4bit
from peft_models import (
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
from test_adapter_files import llama as plain_llama
from test_adapter_files import logits
from tolerance import assert_same_bits

X = (5, 7, 64)


def quantized(dense: torch.Tensor, like: lk.Weight4bit) -> torch.Tensor:
    w = quantize_4bit(dense, like.quant_type, like.blocksize, like.double_quant, like.packed.dtype)
    return w.dequantize(torch.float32)


def delta(layer, name: str) -> torch.Tensor:
    A, B = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    return layer.scaling[name] * (B @ A)


# -- merging ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"quant_type": "fp4", "blocksize": 128, "double_quant": False}]
)
def test_merge_quantizes_the_sum_and_unmerge_restores_the_bytes(settings, safe_merge):
    model = base()
    model.up = lk.Linear4bit.from_linear(nn.Linear(64, 96), **settings)
    model = wrapped(model)
    add([model], "b", r=3)
    before, x = packed(model), torch.randn(X)
    expected = model(x)
    originals = [layer.base_layer.dequantize(torch.float32) for layer in layers(model)]
    model.merge_adapter(safe_merge=safe_merge)
    for layer, W in zip(layers(model), originals, strict=True):
        w = layer.base_layer.weight4bit
        assert layer.merged_adapters == ["default"]
        torch.testing.assert_close(
            w.dequantize(torch.float32), quantized(W + delta(layer, "default"), w)
        )
        assert_same_bits("y", layer(x_ := torch.randn(3, layer.in_features)), layer.base_layer(x_))
    near = (model(x) - expected).norm() / expected.norm()
    assert 0 < near < 0.2
    with pytest.warns(UserWarning, match="additionally merging b"):
        model.merge_adapter(["default", "b"], safe_merge=safe_merge)
    for layer, W in zip(
        layers(model), originals, strict=True
    ):  # from W, not from the merged weight
        both = W + delta(layer, "default") + delta(layer, "b")
        w = layer.base_layer.weight4bit
        torch.testing.assert_close(w.dequantize(torch.float32), quantized(both, w))
    model.unmerge_adapter()
    assert_same_packed(model, before)
    assert_same_bits("y", model(x), expected)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layers(model)[0].unmerge()


def test_disabling_unmerges_as_in_peft():
    model, x = wrapped(), torch.randn(X)
    with model.disable_adapter():
        plain = model(x)
    expected = model(x)
    model.merge_adapter()
    with model.disable_adapter():
        assert_same_bits("y", model(x), plain)
    assert_same_bits("y", model(x), expected)


def test_merge_of_biases_and_of_dora():
    """The merged layer is the dense one merged by PEFT, but for the quantization."""
    ours, theirs = pair(r=4, lora_bias=True, target_modules=["up"])
    bias = ours.base_model.model.up.bias.clone()
    dora = pair(r=4, use_dora=True)
    add(dora, "b", r=3)
    for mine, other in ((ours, theirs), dora):
        before = packed(mine)
        for model in (mine, other):
            model.merge_adapter([*model.peft_config])
        for layer in layers(mine):
            name = next(n for n, m in mine.named_modules() if m is layer)
            merged = other.get_submodule(name).base_layer
            w = layer.base_layer.weight4bit
            # One code more or less where a sum of other rounding crosses a boundary.
            exact = quantized(merged.weight.detach(), w)
            assert ((w.dequantize(torch.float32) - exact).abs() > 1e-5).float().mean() < 0.01
            if merged.bias is not None:
                assert_near(layer.base_layer.bias, merged.bias)
        mine.unmerge_adapter()
        assert_same_packed(mine, before)
    assert torch.equal(ours.base_model.model.up.bias, bias)


def test_what_cannot_be_merged_leaves_the_layer_as_it_was():
    model = wrapped(lora_bias=True, target_modules=["inner.1"])
    before = packed(model)
    with pytest.raises(RuntimeError, match="the base layer has no bias"):
        model.merge_adapter()
    alora = wrapped(base(), alora_invocation_tokens=[1])
    with pytest.raises(NotImplementedError, match="aLoRA does not support"):
        alora.merge_adapter()
    for safe_merge in (False, True):  # 4 bits cannot hold a NaN, so always
        broken = wrapped()
        original = packed(broken)
        layers(broken)[0].lora_A["default"].weight.data[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"NaNs detected .* default"):
            broken.merge_adapter(safe_merge=safe_merge)
        assert_same_packed(broken, original)
        assert not layers(broken)[0].merged
    assert_same_packed(model, before)


def test_unloading():
    model, x = wrapped(), torch.randn(X)
    before = packed(model)
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    expected = merged(x)
    for unload in (model.merge_and_unload, merged.unload):
        plain = unload()
        assert type(plain.up) is type(plain.inner[1]) is lk.Linear4bit and not plain.up.merged
        assert_same_bits("y", plain(x), expected)
        assert {n for n in plain.state_dict() if "base_layer" in n or "lora" in n} == set()
        plain.load_state_dict(plain.state_dict())  # and it may load weights again
    plain = wrapped(r=4).unload()
    assert type(plain.up) is lk.Linear4bit and len(packed(plain)) == len(before)


def test_merged_layers_move_and_do_not_load(tmp_path):
    model = wrapped()
    before = packed(model)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="the layer is merged; call unmerge"):
        model.load_state_dict(model.state_dict())
    model.to(torch.bfloat16).to(torch.float32)
    model.unmerge_adapter()
    assert_same_packed(model, before)


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_files_are_those_of_dense_layers(tmp_path, config):
    ours, theirs = pair(r=4, **config)
    x = torch.randn(X)
    for model, folder in ((ours, "ours"), (theirs, "theirs")):
        model.save_pretrained(tmp_path / folder)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    expected = theirs(x)
    for model in (theirs.unload(), ours.unload()):
        for low_cpu_mem_usage in (False, True):
            loaded = peft.PeftModel.from_pretrained(
                model, tmp_path / "ours", low_cpu_mem_usage=low_cpu_mem_usage
            )
            assert_near(loaded(x), expected)
            model = loaded.unload()


def test_files_read_by_load_adapter_and_by_bitsandbytes(tmp_path):
    bnb = pytest.importorskip("bitsandbytes", reason="adapters move between its layers and ours")
    model = base()
    own, others = copy.deepcopy(model), copy.deepcopy(model)
    wrapped_model = wrapped(model, r=4)
    wrapped_model.save_pretrained(tmp_path)
    expected, x = wrapped_model, torch.randn(X)
    lk.replace_linear(own, r=1, progress=False)
    lk.load_adapter(own, tmp_path)
    assert_near(own(x), expected(x))

    layer = others.up  # bitsandbytes' CPU kernels do not take the 96 columns of the other
    others.up = bnb.nn.Linear4bit(64, 96, True, torch.float32, quant_type="nf4")
    others.up.weight = bnb.nn.Params4bit(
        layer.dequantize(torch.float32), requires_grad=False, quant_type="nf4"
    )
    others.up.bias = layer.bias
    others.up.to("cpu")
    others.is_loaded_in_4bit = True
    loaded = peft.PeftModel.from_pretrained(others, tmp_path)
    kinds = {
        type(m).__module__ for m in loaded.modules() if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert kinds == {"peft.tuners.lora.bnb", layers(loaded)[0].__module__}
    assert torch.allclose(loaded(x), expected(x), atol=0.05)  # its statistics are rounded again
    loaded.save_pretrained(tmp_path / "again")
    files = (load_file(tmp_path / p / "adapter_model.safetensors") for p in (".", "again"))
    ours, again = files
    assert ours.keys() == again.keys() and all(torch.equal(ours[k], again[k]) for k in ours)


# -- the rest of the interface ---------------------------------------------------------------------


def test_several_adapters_and_their_management(tmp_path):
    models, x = pair(r=4), torch.randn(X)
    before = packed(models[0])
    add(models, "b", r=4, lora_alpha=3)
    for model in models:
        model.add_weighted_adapter(["default", "b"], [0.5, 0.25], "cat", combination_type="cat")
        model.add_weighted_adapter(["default", "b"], [0.5, 2.0], "svd", combination_type="svd")
        model.add_weighted_adapter(
            ["default", "b"], [0.5, 2.0], "linear", combination_type="linear"
        )
    for name in ("b", "cat", "svd", "linear"):
        for model in models:
            model.set_adapter(name)
        assert_near(models[0](x), models[1](x))
    ours, theirs = (next(m for m in model.modules() if hasattr(m, "lora_A")) for model in models)
    assert_near(ours.get_delta_weight("b"), theirs.get_delta_weight("b"))
    assert ours.supports_lora_conversion("b")
    for model in models:
        for layer in model.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("linear", 3.0)
        model.delete_adapter("svd")
    assert_near(models[0](x), models[1](x))
    assert "svd" not in ours.lora_A and set(models[0].peft_config) == {
        "default",
        "b",
        "cat",
        "linear",
    }
    assert_same_packed(models[0], before)
    models[0].merge_adapter(["b"])
    with contextlib.suppress(ValueError):  # newer versions refuse to delete what is merged
        models[0].delete_adapter("b")
    models[0].unmerge_adapter()
    assert_same_packed(models[0], before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_kbit_training_keeps_the_bytes(dtype):
    model = base()
    model.up = lk.Linear4bit.from_linear(nn.Linear(64, 96), quant_storage=dtype)
    before = packed(model)
    model.is_loaded_in_4bit = True
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = wrapped(model)
    assert_same_packed(model, before)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 4 and all("lora_" in name for name in trainable)


def test_a_language_model_from_quantizing_to_generating(tmp_path):
    """``target_modules="all-linear"``, layers by number, generate with mixed adapters, replicated layers."""
    model = plain_llama()
    lk.replace_linear(model, r=0, progress=False)
    model = peft.get_peft_model(
        model, peft.LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    )
    assert len(layers(model)) == 14
    some = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "r": 3}
    model.add_adapter("b", peft.LoraConfig(**some, init_lora_weights=False))
    assert sum("b" in layer.lora_A for layer in layers(model)) == 2
    model.eval()
    tokens = torch.arange(30).view(3, 10)
    mixed = {"adapter_names": ["default", "b", "__base__"], "max_new_tokens": 4, "do_sample": False}
    answers = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **mixed)
    for i, name in enumerate(("default", "b")):
        model.set_adapter(name)
        alone = model.generate(
            input_ids=tokens[i : i + 1],
            attention_mask=torch.ones(1, 10),
            max_new_tokens=4,
            do_sample=False,
        )
        assert torch.equal(answers[i], alone[0])
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.set_adapter("default")
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(layer.lora_A["default"].weight.grad is not None for layer in layers(model))


def test_replicated_layers_share_the_packed_weights():
    model = plain_llama()
    lk.replace_linear(model, r=0, progress=False)
    config = peft.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]], r=4)
    model = peft.get_peft_model(model, config)
    _, second, third = layers(model)
    assert second.base_layer.weight is third.base_layer.weight
    assert second.lora_A["default"].weight is not third.lora_A["default"].weight
    assert logits(model).isfinite().all()
