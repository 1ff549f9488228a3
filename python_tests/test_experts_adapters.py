"""Adapters on experts in 4 bits: this library's own, in files, and PEFT's."""

import copy
import json

import peft
import pytest
import torch

import lowrank_kernels as lk
from tiny_experts import BOTH, TOKENS, adapted, dense, logits, pair, randomize, stacks, twin_of

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
NAMES = ["qwen3_moe", "gpt_oss"]
TARGETS = [BOTH, ["experts.down_proj"], ["layers.1.mlp.experts.gate_up_proj"]]
pytestmark = pytest.mark.filterwarnings("ignore")


# -- this library's own ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parameters", TARGETS)
def test_files_load_in_peft_on_the_dense_twin_and_here_again(name, parameters, tmp_path):
    model = adapted(name, parameters, adapter="x")
    expected = logits(model)
    lk.save_adapter(model, tmp_path / "ours", "x")
    base = dense(name)
    lk.replace_linear(base, r=4, progress=False)
    lk.delete_adapter(base, "default")
    theirs = peft.PeftModel.from_pretrained(twin_of(base, dense(name)), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), expected, **CLOSE)
    lk.load_adapter(base, tmp_path / "ours", "y")
    assert torch.equal(logits(base), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    lk.load_adapter(base, tmp_path / "theirs", "z")
    assert torch.equal(logits(base), expected)


@pytest.mark.parametrize("name", NAMES)
def test_merging_and_the_exact_way_back(name):
    model = adapted(name, BOTH)
    before = {key: stack.weight.clone() for key, stack in stacks(model).items()}
    expected = logits(model)
    lk.merge_adapter(model)
    merged = logits(model)
    for key, stack in stacks(model).items():
        A, B, scaling = stack.factors("default")
        W = lk.Weight4bit.dequantize(stack._unmerged, torch.float32)
        delta = scaling * (B @ A)
        want = W + (delta.transpose(1, 2) if stack.transposed else delta)
        quantized = lk.quantize_4bit(want)
        assert torch.equal(stack.weight, quantized.packed), key
    assert not torch.equal(merged, expected)
    lk.unmerge_adapter(model)
    assert all(torch.equal(stack.weight, before[key]) for key, stack in stacks(model).items())
    assert torch.equal(logits(model), expected)


def test_adapters_of_a_model():
    model, _ = pair("qwen3_moe")
    base = logits(model)
    lk.add_adapter(model, "e", r=4, target_modules=[], target_parameters=BOTH)
    assert torch.equal(logits(model), base)  # B = 0
    layers = lk.adapters(model)["e"].layers
    assert list(layers) == list(stacks(model))
    randomize(model)
    changed = logits(model)
    assert not torch.allclose(changed, base, atol=1e-3)
    with lk.disable_adapters(model):
        assert torch.equal(logits(model), base)
    lk.add_adapter(model, "f", r=2, target_modules=[], target_parameters="experts.down_proj")
    with lk.set_adapter(model, "f"):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), changed)
    lk.delete_adapter(model, "e")
    lk.delete_adapter(model, "f")
    assert lk.adapters(model) == {} and torch.equal(logits(model), base)


def test_what_is_refused():
    model, _ = pair("qwen3_moe")
    add = {"name": "e", "target_modules": []}
    with pytest.raises(
        ValueError, match=r"target_parameters: .*'experts.up_proj'.* matches no stack"
    ):
        lk.add_adapter(model, **add, target_parameters=["experts.up_proj"])
    with pytest.raises(ValueError, match="lora_dropout: expected 0 for adapters of experts"):
        lk.add_adapter(model, **add, target_parameters=BOTH, lora_dropout=0.1)
    assert lk.adapters(model) == {}
    with pytest.raises(ValueError, match="lora_dropout: expected 0 for adapters of experts"):
        lk.replace_linear(dense("qwen3_moe"), r=4, lora_dropout=0.1, target_parameters=BOTH)
    with pytest.raises(ValueError, match="target_parameters: expected r > 0"):
        lk.replace_linear(dense("qwen3_moe"), r=0, target_parameters=BOTH)
    with pytest.raises(
        ValueError, match=r"target_parameters: .*'experts.up_proj'.* matches no stack"
    ):
        lk.replace_linear(dense("qwen3_moe"), r=4, target_parameters=["experts.up_proj"])


@pytest.mark.parametrize("damage", ["rank", "partner", "dropout", "other module", "nan"])
def test_damaged_files_change_nothing(damage, tmp_path):
    from safetensors.torch import load_file, save_file

    lk.save_adapter(adapted("qwen3_moe", BOTH), tmp_path)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, settings = load_file(file), json.loads(config.read_text())
    key = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"
    if damage == "rank":
        tensors[key] = tensors[key][:-1].contiguous()
    elif damage == "partner":
        del tensors[key]
    elif damage == "dropout":
        settings["lora_dropout"] = 0.1
    elif damage == "nan":
        tensors[key][0, 0] = torch.nan
    else:
        settings["target_parameters"] = ["experts.gate_up_proj"]
    save_file(tensors, file)
    config.write_text(json.dumps(settings))
    model, _ = pair("qwen3_moe")
    before = logits(model)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        lk.load_adapter(model, tmp_path)
    assert lk.adapters(model) == {} and torch.equal(logits(model), before)


# -- PEFT's ----------------------------------------------------------------------------------------


def config_of(r=4, **options):
    return peft.LoraConfig(
        r=r, lora_alpha=8, target_modules=["q_proj", "down_proj"], target_parameters=BOTH, **options
    )


def twins(name, **options):
    """The model in 4 bits and its dense twin under PEFT, with equal adapters."""
    model, twin = pair(name)
    ours, theirs = (peft.get_peft_model(m, config_of(**options)) for m in (model, twin))
    same_adapters(ours, theirs, "default")
    return ours, theirs


def same_adapters(ours, theirs, adapter):
    generator = torch.Generator().manual_seed(len(adapter))
    state = peft.get_peft_model_state_dict(theirs, adapter_name=adapter)
    state = {k: torch.randn(v.shape, generator=generator) * 0.1 for k, v in sorted(state.items())}
    for model in (ours, theirs):
        peft.set_peft_model_state_dict(model, state, adapter_name=adapter)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_computes_what_it_does_on_the_dense_model(name, rslora):
    ours, theirs = twins(name, use_rslora=rslora)
    keys = [{key for key in m.state_dict() if "lora_" in key} for m in (ours, theirs)]
    assert keys[0] == keys[1] and any("experts.base_layer.lora_A" in key for key in keys[0])
    y, expected = logits(ours), logits(theirs)
    torch.testing.assert_close(y, expected, **CLOSE)
    y.square().mean().backward()
    expected.square().mean().backward()
    gradients = [
        {n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (ours, theirs)
    ]
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_several_adapters_under_peft(name):
    ours, theirs = twins(name)
    for model in (ours, theirs):
        model.add_adapter("other", config_of(r=2))
    same_adapters(ours, theirs, "other")
    for active in ("other", ["default", "other"], "default"):
        for model in (ours, theirs):
            model.base_model.set_adapter(active)
        torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)
    ours.delete_adapter("default")
    theirs.delete_adapter("default")
    for model in (ours, theirs):
        model.set_adapter("other")
    torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_peft_merges_and_unmerges_exactly(name):
    ours, _ = twins(name)
    before = {key: stack.weight.clone() for key, stack in stacks(ours).items()}
    expected = logits(ours)
    ours.merge_adapter()
    merged = logits(ours)
    assert not torch.equal(merged, expected)
    with ours.disable_adapter():
        pass  # unmerges
    ours.unmerge_adapter()
    assert all(torch.equal(stack.weight, before[key]) for key, stack in stacks(ours).items())
    assert torch.equal(logits(ours), expected)
    unloaded = copy.deepcopy(ours).merge_and_unload()
    assert torch.equal(logits(unloaded), merged)
    assert not any(stack.merged for stack in stacks(unloaded).values())  # no bytes are kept aside
    assert torch.equal(logits(ours.unload()), logits(pair(name)[0]))


def test_peft_files_both_ways(tmp_path):
    ours, theirs = twins("qwen3_moe")
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    model, twin = pair("qwen3_moe")
    expected = logits(ours)
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(twin, tmp_path / "ours")), expected, **CLOSE
    )
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "theirs")
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_peft_adapts_what_it_does_in_the_dense_model(targets):
    """A stack is a parameter, whatever the module that holds it is called."""
    names = []
    for model in pair("olmoe"):
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
        names.append({name for name, _ in model.named_parameters() if "lora_" in name})
    assert names[0] == names[1] and names[0]


def test_stacks_alone_are_no_targets_of_target_modules():
    for model in pair("gpt_oss"):
        with pytest.raises(ValueError, match="not found in the base model"):
            peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["down_proj"]))


def test_peft_refuses_stacks_with_adapters_of_their_own():
    model = adapted("qwen3_moe", BOTH)
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=BOTH[1:])
    with pytest.raises(ValueError, match=r"target_parameters: .*down_proj.*\['default'\]"):
        peft.get_peft_model(model, config)


def test_steps_of_training_give_equal_losses():
    losses = []
    for model in twins("qwen3_moe"):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        found = []
        for _ in range(4):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        losses.append(found)
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
