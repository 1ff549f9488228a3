"""Experts4bit: models with stacked experts compute what their dense twins do, in every state a model gets into."""

import copy
import importlib
import io
import pickle

import pytest
import torch
import transformers

import lowrank_kernels as lk
import tolerance
from lowrank_kernels.experts import Experts4bit, GroupedLinear4bit, stacked_parameters
from tiny_experts import CONFIGS, TOKENS, dense, logits, pair, stacks

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_of_a_family(name):
    model, twin = pair(name)
    assert stacks(model)
    torch.testing.assert_close(logits(model), logits(twin), **CLOSE)
    embedded = model.get_input_embeddings()(TOKENS).detach()
    gradients = []
    for each in (model, twin):
        x = embedded.clone().requires_grad_()
        each(inputs_embeds=x, use_cache=False).logits.square().mean().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_report_shows_experts_and_routers_stay_dense(name):
    model = dense(name)
    before = {
        f"{path}.{key}": module._parameters[key]
        for path, module in model.named_modules()
        for key in stacked_parameters(module)
    }
    report = lk.replace_linear(model, r=0, progress=False)
    shapes = {layer.name: layer.shape for layer in report.replaced}
    for key, parameter in before.items():
        assert shapes[key] == tuple(parameter.shape) and key in str(report)
    assert not any("experts" in layer.name for layer in report.skipped)
    routers = [n for n, m in model.named_modules() if n.endswith(("router", "gate", "router.proj"))]
    assert routers and not any(isinstance(model.get_submodule(n), lk.Linear4bit) for n in routers)


def test_a_linear_router_is_named():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = dense("qwen3_moe").model.layers[0].mlp.experts
            self.router = torch.nn.Linear(64, 8)
            self.proj = torch.nn.Linear(64, 64)

    report = lk.replace_linear(Block(), r=0, progress=False)
    assert [(x.name, x.reason) for x in report.skipped] == [
        ("router", "a router, which chooses experts")
    ]


def test_bytes_are_less_than_0_30_of_bfloat16():
    model = dense("qwen3_moe").bfloat16()
    report = lk.replace_linear(model, r=0, progress=False)
    assert report.bytes_after <= 0.30 * report.bytes_before


@pytest.mark.parametrize("target", ["mlp.experts", "experts.down_proj", "layers.1.mlp.experts"])
def test_experts_are_excluded_by_module_or_parameter(target):
    model = dense("qwen3_moe")
    report = lk.replace_linear(model, r=0, exclude_modules=["lm_head", target], progress=False)
    left = [
        x.name for x in report.skipped if x.reason == "in exclude_modules" and "experts" in x.name
    ]
    assert len(left) == (1 if "layers" in target else 2)
    assert len(stacks(model)) == 4 - 2 * len(left)


def test_only_experts_are_targeted():
    model = dense("qwen3_moe")
    report = lk.replace_linear(model, ["mlp.experts"], r=0, progress=False)
    assert len(report.replaced) == 4 and all("experts" in x.name for x in report.replaced)


def test_what_is_in_no_float_dtype_stays_dense():
    model = dense("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.detach().to(torch.float64))
    report = lk.replace_linear(model, r=0, progress=False)
    assert {x.reason for x in report.skipped} >= {"down_proj is in float64"}


def test_a_nan_names_the_module():
    model = dense("qwen3_moe")
    model.model.layers[1].mlp.experts.down_proj.data[3, 5, 7] = torch.nan
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.experts: weight: .*got nan at index \(3, 5, 7\)"
    ):
        lk.replace_linear(model, r=0, progress=False)


# -- the module ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_state_dicts(name):
    model, _ = pair(name)
    state, expected = model.state_dict(), logits(model)
    names = {
        f"{path}{suffix}" for path in stacks(model) for suffix in ("", ".absmax", ".quant_map")
    }
    assert names <= state.keys() and not any(
        ".weight." in key and "experts" in key for key in state
    )
    other = dense(name)
    lk.replace_linear(other, r=0, progress=False)
    for parameter in other.parameters():
        if parameter.is_floating_point():
            parameter.data.zero_()
    other.load_state_dict(state)
    assert torch.equal(logits(other), expected)
    other.load_state_dict(dense(name).state_dict())  # dense ones are quantized
    assert torch.equal(logits(other), expected)
    missing = {k: v for k, v in state.items() if not k.endswith("experts.down_proj.absmax")}
    with pytest.raises(RuntimeError, match=r"experts.down_proj.*absmax"):
        other.load_state_dict(missing)
    del missing
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(state | {"model.layers.0.mlp.experts.other": torch.zeros(1)})


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_copies_and_pickles(name):
    model, _ = pair(name)
    expected, file = logits(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), again):
        assert torch.equal(logits(other), expected)
    assert isinstance(again.model.layers[0].mlp.experts, type(model.model.layers[0].mlp.experts))


def test_casts_leave_the_bytes():
    model, _ = pair("gpt_oss")
    before = {n: s.weight.clone() for n, s in stacks(model).items()}
    model.to(torch.bfloat16)
    for key, stack in stacks(model).items():
        assert (
            torch.equal(stack.weight, before[key]) and stack.weight4bit.absmax.dtype == torch.uint8
        )
    assert logits(model).dtype == torch.bfloat16


def test_any_implementation_of_transformers_leaves_experts_in_4_bits():
    model, _ = pair("qwen3_moe")
    expected = logits(model)
    for name in ("eager", "batched_mm", "grouped_mm", "lowrank_kernels"):
        model.set_experts_implementation(name)
        assert torch.equal(logits(model), expected)
    plain = dense("qwen3_moe")
    expected = logits(plain)
    plain.set_experts_implementation("lowrank_kernels")
    torch.testing.assert_close(logits(plain), expected, **CLOSE)


def test_indices_of_other_processes_add_nothing():
    model, twin = pair("qwen3_moe")
    ours, theirs = (m.model.layers[0].mlp.experts for m in (model, twin))
    # grouped_mm leaves such rows uninitialized, a NaN at times. The config is that of `model`, not of its twin.
    theirs.config._experts_implementation = "eager"
    x, index = torch.randn(6, 64), torch.tensor([[0, 8], [8, 8], [3, 8], [8, 1], [7, 2], [4, 4]])
    weights = torch.rand(6, 2).masked_fill(index == 8, 0.0)
    torch.testing.assert_close(ours(x, index, weights), theirs(x, index, weights), **CLOSE)
    assert not ours(x, index, weights)[1].any()


def test_no_tokens():
    model, _ = pair("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    y = experts(torch.zeros(0, 64), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert y.shape == (0, 64)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_token_has_the_same_bits_in_any_batch(name):
    model, _ = pair(name)
    experts = model.model.layers[0].mlp.experts
    E = next(iter(experts.stacks.values())).num_experts
    x, index = torch.randn(40, 64), torch.randint(0, E, (40, 2))
    weights = torch.rand(40, 2)
    with lk.batch_invariant():
        y = experts(x, index, weights)
        tolerance.assert_same_bits("y", experts(x[7:9], index[7:9], weights[7:9]), y[7:9])


def test_compiles_without_breaks():
    model, _ = pair("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    x, index, weights = torch.randn(6, 64), torch.randint(0, 8, (6, 2)), torch.rand(6, 2)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    y, expected = compiled(x, index, weights), experts(x, index, weights)
    torch.testing.assert_close(y, expected)
    a, b = (torch.autograd.grad(t.square().sum(), x)[0] for t in (y, expected))
    torch.testing.assert_close(a, b)


def test_what_is_no_module_of_experts_is_refused():
    with pytest.raises(TypeError, match="experts: expected a module whose class has transformers'"):
        Experts4bit.from_experts(torch.nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"w: expected a stack \[E, N, K\], got shape \(8, 64\)"):
        GroupedLinear4bit.from_weight(lk.quantize_4bit(torch.randn(8, 64)))


# -- transformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_from_pretrained_and_back(name, tmp_path):
    dense(name).save_pretrained(tmp_path / "dense")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "dense", quantization_config=lk.LowRankConfig())
    expected, _ = pair(name)
    assert stacks(model).keys() == stacks(expected).keys()
    for key, stack in stacks(model).items():
        assert torch.equal(stack.weight, stacks(expected)[key].weight), key
    torch.testing.assert_close(logits(model.eval()), logits(expected), **CLOSE)
    assert model.num_parameters() == dense(name).num_parameters()
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved").eval()
    assert torch.equal(logits(again), logits(model))
    torch.testing.assert_close(logits(again.dequantize()), logits(model), **CLOSE)


def test_a_model_of_replace_linear_is_saved(tmp_path):
    model, _ = pair("qwen3_moe")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def test_experts_with_adapters_are_not_saved_with_the_model(tmp_path):
    model = dense("qwen3_moe")
    lk.replace_linear(model, r=2, target_parameters=["experts.down_proj"], progress=False)
    with pytest.raises(ValueError, match=r"experts.down_proj has adapters \['default'\]"):
        model.save_pretrained(tmp_path)


def test_experts_stay_dense_in_a_checkpoint_for_bitsandbytes(tmp_path):
    dense("qwen3_moe").save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path, quantization_config=lk.LowRankConfig(save_as="bitsandbytes"))
    assert not stacks(model)
    why = {x.reason for x in model.hf_quantizer.skipped if "experts" in x.name}
    assert why == {"transformers reads no experts in bitsandbytes' 4 bits"}


def test_a_stack_of_another_shape_is_refused(tmp_path):
    model, _ = pair("qwen3_moe")
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.moe_intermediate_size = 32
    with pytest.raises(RuntimeError, match="issues during automatic conversion of the weights"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, config=config)


def test_training_reaches_what_is_not_frozen():
    model = dense("gpt_oss")
    lk.replace_linear(model, r=4, target_parameters=["experts.gate_up_proj"], progress=False)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained)
    assert sum("gate_up_proj.lora_A" in name for name in trained) == 2
    logits(model).square().mean().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained


def test_gradient_checkpointing():
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = dense("qwen3_moe").train()
        lk.replace_linear(model, r=4, target_parameters=["experts.down_proj"], progress=False)
        for parameter in lk.adapters(model)["default"].parameters:
            torch.nn.init.normal_(parameter, std=0.1)
        if checkpointed:
            model.gradient_checkpointing_enable()
        logits(model).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys()
    for key in plain:
        torch.testing.assert_close(again[key], plain[key], rtol=1e-5, atol=1e-8)


WITHOUT_MODELS = {
    "aria": (
        "AriaExperts",
        "AriaTextConfig",
        {"hidden_size": 64, "moe_num_experts": 4, "intermediate_size": 64},
    ),
    "muse_spark": (
        "MuseSparkExperts",
        "MuseSparkTextConfig",
        {"moe_hidden_size": 64, "num_local_experts": 4, "moe_intermediate_size": 64},
    ),
}


@pytest.mark.parametrize("family", WITHOUT_MODELS)
def test_families_of_which_no_whole_model_is_small(family):
    """Stacks that lie transposed without biases, and a norm after each expert."""
    (name, config, sizes), module = WITHOUT_MODELS[family], f"transformers.models.{family}"
    modeling = pytest.importorskip(f"{module}.modeling_{family}", reason="of newer transformers")
    config = getattr(importlib.import_module(f"{module}.configuration_{family}"), config)
    torch.manual_seed(0)
    experts = getattr(modeling, name)(config(**sizes))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours = Experts4bit.from_experts(experts)
    x, index, weights = torch.randn(9, 64), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    results = []
    for each in (ours, ours.dequantized()):
        rows = x.clone().requires_grad_()
        y = each(rows, index, weights)
        results.append((y, *torch.autograd.grad(y.square().sum(), rows)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, **CLOSE)
