"""replace_linear of experts: hooks, memory, modules that are there more than once, and experts in 4 bits already."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import lowrank_kernels as lk

pytest.importorskip("transformers", reason="the experts are those of its models")

from tiny_experts import dense, logits, stacks, twin_of

pytestmark = pytest.mark.filterwarnings("ignore")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def replaced(name: str = "qwen3_moe", **options) -> torch.nn.Module:
    model = dense(name)
    lk.replace_linear(model, **{"r": 0, "progress": False} | options)
    return model


def test_hooks_stay_and_their_handles_remove_them():
    model, seen = dense("qwen3_moe"), []
    experts = model.model.layers[1].mlp.experts
    handle = experts.register_forward_hook(lambda module, args, output: seen.append(module))
    lk.replace_linear(model, r=0, progress=False)
    logits(model)
    assert seen == [model.model.layers[1].mlp.experts] and isinstance(seen[0], lk.Experts4bit)
    handle.remove()
    logits(model)
    assert len(seen) == 1


def test_accelerates_hook_moves():
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")

    class Hook(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    model, seen = dense("qwen3_moe"), []
    hooks.add_hook_to_module(model.model.layers[0].mlp.experts, Hook())
    lk.replace_linear(model, r=0, progress=False)
    expected = logits(twin_of(model, dense("qwen3_moe")))
    seen.clear()
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    assert seen == [model.model.layers[0].mlp.experts] and isinstance(seen[0], lk.Experts4bit)
    hooks.remove_hook_from_module(seen[0])
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    assert len(seen) == 1


def test_a_forward_that_somebody_replaced_keeps_experts_dense():
    model = dense("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    experts.forward = lambda x, index, weights: torch.zeros_like(x)
    report = lk.replace_linear(model, r=0, progress=False)
    why = {x.name: x.reason for x in report.skipped}
    assert why["model.layers.0.mlp.experts"] == "its forward has been replaced"
    assert model.model.layers[0].mlp.experts is experts and len(stacks(model)) == 2


def test_experts_of_two_layers_that_are_one():
    model = dense("qwen3_moe")
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    report = lk.replace_linear(model, r=0, progress=False)
    assert model.model.layers[1].mlp.experts is model.model.layers[0].mlp.experts
    assert isinstance(model.model.layers[0].mlp.experts, lk.Experts4bit)
    assert sum("experts" in x.name for x in report.replaced) == 2


def test_a_stack_that_two_modules_share_stays_dense():
    model = dense("qwen3_moe")
    a, b = (layer.mlp.experts for layer in model.model.layers)
    b.down_proj = a.down_proj
    report = lk.replace_linear(model, r=0, progress=False)
    why = [x.reason for x in report.skipped if x.name.endswith("experts")]
    assert why == [f"down_proj shared with model.layers.{i}.mlp.experts" for i in (1, 0)]
    assert a.down_proj is b.down_proj and not stacks(model)


def test_experts_in_4_bits_already():
    model = replaced()
    before = {name: stack.weight.clone() for name, stack in stacks(model).items()}
    report = lk.replace_linear(model, r=4, target_parameters="experts.down_proj", progress=False)
    for name, stack in stacks(model).items():
        assert torch.equal(stack.weight, before[name])
        assert ("default" in stack.r) == name.endswith("down_proj")
    assert {x.name for x in report.replaced} >= before.keys()
    with pytest.raises(ValueError, match=r"experts\.down_proj has adapters already; add_adapter"):
        lk.replace_linear(model, r=4, target_parameters="experts.down_proj", progress=False)


def test_routers_stay_dense_beside_experts_in_4_bits():
    model = replaced("gemma4", target_modules=["experts"])
    reasons = {x.name: x.reason for x in lk.replace_linear(model, r=0, progress=False).skipped}
    for i in (0, 1):
        assert reasons[f"model.layers.{i}.router.proj"] == "a router, which chooses experts"
        assert reasons[f"model.layers.{i}.experts"] == "in 4 bits already"


def test_a_nan_leaves_the_module_whole():
    model = dense("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj.data[1, 2, 3] = torch.nan
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.experts: weight: .*nan at index \(1, 2, 3\)"
    ):
        lk.replace_linear(model, r=0, progress=False)
    assert experts.gate_up_proj.shape == (8, 128, 64) and experts.down_proj.shape == (8, 64, 64)


def test_training_mode_and_requires_grad_stay():
    model = dense("qwen3_moe").train()
    model.model.layers[1].mlp.experts.eval()
    lk.replace_linear(model, r=0, progress=False)
    first, second = (layer.mlp.experts for layer in model.model.layers)
    assert first.training and all(stack.training for stack in first.stacks.values())
    assert not second.training and not any(stack.training for stack in second.stacks.values())
    assert model.model.embed_tokens.weight.requires_grad


def test_fused_layers_beside_experts():
    model = replaced(fuse=True)
    torch.testing.assert_close(logits(model), logits(twin_of(model, dense("qwen3_moe"))), **CLOSE)


def test_the_repr_says_what_a_stack_is():
    text = repr(replaced("gpt_oss").model.layers[0].mlp.experts)
    assert "num_experts=4, in_features=64, out_features=128, " in text and "transposed=True" in text


def test_both_projections_are_in_4_bits_or_none():
    experts = dense("qwen3_moe").model.layers[0].mlp.experts
    one = {"down_proj": lk.quantize_4bit(experts.down_proj)}
    with pytest.raises(ValueError, match=r"stacks: expected \('gate_up_proj', 'down_proj'\), got"):
        lk.Experts4bit.from_weights(experts, one)


_MEMORY = """
import re, torch, transformers, lowrank_kernels as lk
def kib(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
config = transformers.Qwen3MoeConfig(hidden_size=1024, moe_intermediate_size=512, num_experts=32)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
def experts():
    module = Qwen3MoeExperts(config).bfloat16()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module
block = torch.nn.Module()
small = transformers.Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=64, num_experts=4)
block.experts = Qwen3MoeExperts(small)
torch.nn.init.normal_(block.experts.gate_up_proj), torch.nn.init.normal_(block.experts.down_proj)
lk.replace_linear(block, r=0, progress=False)
block.experts = experts()
before = kib("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
lk.replace_linear(block, r=0, progress=False)
print(kib("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_dense_copy_is_made():
    """The stacks are 64 and 32 MiB in bfloat16: beside them there is the one in 4 bits, 16.5 MiB, and no more."""
    done = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) <= 24 * 1024
