"""Experts in 4 bits under PyTorch's machinery: models compiled and exported, replicas, autocast, other tensors."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch

import lowrank_kernels as lk
from tolerance import assert_same_bits

pytest.importorskip("transformers", reason="experts are those of transformers' models")

from test_torch_features import replicas
from tiny_experts import BOTH, TOKENS, adapted, logits, pair

FAMILIES = ("qwen3_moe", "gpt_oss")
each_family = pytest.mark.parametrize("family", FAMILIES)


def experts_of(model) -> lk.Experts4bit:
    return model.model.layers[0].mlp.experts


def example(rows: int = 9) -> tuple[torch.Tensor, ...]:
    return torch.randn(rows, 64), torch.randint(0, 4, (rows, 2)), torch.rand(rows, 2)


def trained(module, case, run=None) -> dict[str, torch.Tensor]:
    """y and all gradients."""
    module.zero_grad()
    x, index, weights = case
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = (run or module)(x, index, weights)
    y.square().sum().backward()
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return found | {"y": y.detach(), "dx": x.grad, "dweights": weights.grad}


@each_family
def test_a_whole_model_compiles_without_breaks(family):
    """Forward and backward, of any batch after the second."""
    torch.compiler.reset()
    model = adapted(family, BOTH)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rows in (1, 2, 3):
        tokens = torch.randint(0, 96, (rows, 9))
        gradients = []
        for each in (model, compiled):
            model.zero_grad()
            y = logits(each, tokens)
            y.square().mean().backward()
            gradients.append(
                [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
            )
        assert len(gradients[0]) > 8
        for expected, actual in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@each_family
@pytest.mark.parametrize("adapters", [True, False])
def test_export_saved_and_loaded(family, adapters):
    """For any number of tokens; the program holds the packed bytes, and nothing dense."""
    experts = experts_of(adapted(family, BOTH) if adapters else pair(family)[0]).eval()
    rows = torch.export.Dim("rows", min=2, max=1024)
    shapes = {0: rows}, {0: rows}, {0: rows}
    program = torch.export.export(experts, example(), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    dense = min(stack.weight.numel() * 2 for stack in experts.stacks.values())
    held = [*loaded.state_dict.values(), *loaded.constants.values()]
    assert max(t.numel() for t in held if isinstance(t, torch.Tensor)) <= dense
    for count in (2, 5, 30):
        case = example(count)
        with torch.no_grad():
            assert_same_bits(family, loaded.module()(*case), experts(*case))


@each_family
def test_a_whole_model_is_exported(family):
    model = adapted(family, BOTH)
    program = torch.export.export(
        model, (), {"input_ids": TOKENS, "use_cache": False}, strict=False
    )
    other = torch.randint(0, 96, TOKENS.shape)
    with torch.no_grad():
        y = program.module()(input_ids=other, use_cache=False).logits
        torch.testing.assert_close(y, logits(model, other))


@each_family
def test_replicas_work(family, monkeypatch):
    """nn.DataParallel: each replica has its own tensors, gradients come to the model's parameters."""
    experts = experts_of(adapted(family, BOTH))
    case = example(8)

    def run(*case):
        copies = replicas(experts, 2, monkeypatch)
        for copied in copies:
            assert not list(copied.parameters())
            for name, stack in experts.stacks.items():
                mine, theirs = copied.stacks[name].weight4bit, stack.weight4bit
                assert mine.packed.data_ptr() != theirs.packed.data_ptr()
                assert mine.absmax.data_ptr() != theirs.absmax.data_ptr()
        parts = zip(*(tensor.chunk(2) for tensor in case))
        return torch.cat([copied(*part) for copied, part in zip(copies, parts)])

    expected, actual = trained(experts, case), trained(experts, case, run)
    assert actual.keys() == expected.keys() and len(actual) >= 7
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() < 1e-5 * value.abs().max(), name


@each_family
def test_replicas_of_a_model_work(family, monkeypatch):
    model = adapted(family, BOTH)
    with torch.no_grad():
        for copied in replicas(model, 2, monkeypatch):
            torch.testing.assert_close(logits(copied), logits(model))


@each_family
def test_autocast_casts_rows(family):
    experts = experts_of(adapted(family, BOTH))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x, index, weights = example()
        y = experts(x, index, weights)
    assert y.dtype == torch.float32
    expected = experts(x, index, weights)
    assert 1e-6 < (y - expected).abs().max() < 0.05 * expected.abs().max()


@each_family
def test_functional_call_and_module_copies(family):
    """Other tensors in place of the adapters' and of the packed bytes."""
    experts, other = experts_of(adapted(family, BOTH)), experts_of(adapted(family, BOTH, seed=6))
    case = example()
    y = torch.func.functional_call(experts, dict(other.named_parameters()), case)
    assert_same_bits(family, y, other(*case))
    with pytest.raises(AssertionError):
        assert_same_bits(family, y, experts(*case))


# Two stacks of 128 and 64 MiB in float32. The first step allocates what stays.
_MEMORY = """
import sys, torch, transformers, lowrank_kernels as lk
def kib(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))
torch.set_num_threads(1)
if sys.argv[1] == "gpt_oss":
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts as Experts
    config = transformers.GptOssConfig(hidden_size=1024, intermediate_size=512, num_local_experts=32)
else:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts as Experts
    config = transformers.Qwen3MoeConfig(hidden_size=1024, moe_intermediate_size=512, num_experts=32)
experts = Experts(config).requires_grad_(False)
for parameter in experts.parameters():
    torch.nn.init.normal_(parameter, std=0.02)
experts = lk.Experts4bit.from_experts(experts)
for stack in experts.stacks.values():
    stack.add_adapter("default", r=16)
def step():
    x = torch.randn(64, 1024, requires_grad=True)
    index, weights = torch.randint(0, 32, (64, 2)), torch.rand(64, 2)
    experts(x, index, weights).sum().backward()
    sizes = [p.grad.numel() * 4 for p in experts.parameters() if p.grad is not None]
    for parameter in experts.parameters():
        parameter.grad = None
    return sum(sizes)
step()
before = kib("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
gradients = step()
print(kib("VmHWM") - before - gradients // 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@each_family
def test_a_step_makes_no_dense_stack(family):
    """4 MiB, rows of 64 tokens, and a copy of B, which PEFT's layout scatters: 2 MiB, of a transposed stack 4 MiB."""
    done = subprocess.run([sys.executable, "-c", _MEMORY, family], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) <= 12 * 1024
