"""Where A or B is more than its weight (hooks, offloading, parametrizations), what it is gets called."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import lowrank_kernels as lk
from lowrank_kernels.nn import LoRALinear4bit

WHY = "offloading is accelerate's"


def net(**arguments) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    lk.replace_linear(model, progress=False, **({"r": 4, "init_lora_weights": False} | arguments))
    return model


def expected(
    layer: LoRALinear4bit, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor
) -> torch.Tensor:
    return (
        nn.functional.linear(x, layer.dequantize(), layer.bias)
        + x @ A.T @ B.T * layer.scaling["default"]
    )


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _forward_hook(A, B):
    B.register_forward_hook(lambda module, args, out: out * 2)


def _forward_pre_hook(A, B):
    B.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _replaced_forward(A, B):
    forward = B.forward
    B.forward = lambda x: forward(x) * 2


def _parametrized(A, B):
    parametrize.register_parametrization(A, "weight", Double())


@pytest.mark.parametrize(
    "change", [_forward_hook, _forward_pre_hook, _replaced_forward, _parametrized]
)
def test_what_a_and_b_do_is_done(change):
    model = net()
    layer, x = model[0], torch.randn(5, 64)
    A, B = (p.detach().clone() for p in layer.adapter_parameters("default"))
    change(layer.lora_A["default"], layer.lora_B["default"])
    y = layer(x)
    assert torch.allclose(y, expected(layer, x, 2 * A, B), atol=1e-4)
    y.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters() if p.requires_grad)
    with lk.disable_adapters(model):
        assert torch.allclose(layer(x), expected(layer, x, 0 * A, B), atol=1e-4)


def test_backward_hooks_run():
    model, seen = net(), []
    for part in (model[0].lora_A["default"], model[2].lora_B["default"]):
        part.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(module))
    model(torch.randn(5, 64)).sum().backward()
    assert seen == [model[2].lora_B["default"], model[0].lora_A["default"]]


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_weight_norm_trains(norm):
    model, x = net(), torch.randn(5, 64)
    before = model(x).detach()
    for layer in (model[0], model[2]):
        norm(layer.lora_A["default"])
    assert torch.allclose(model(x), before, atol=1e-5)  # normed, and scaled by the norms
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    layer = model[0]
    y = layer(x)
    A, B = layer.adapter_parameters("default")
    assert torch.allclose(y, expected(layer, x, A, B), atol=1e-4)
    assert (model(x) - before).abs().max() > 1e-3


def test_pruned_adapters():
    model, x = net(), torch.randn(5, 64)
    prune.l1_unstructured(model[0].lora_B["default"], "weight", amount=0.5)
    A, B = model[0].adapter_parameters("default")
    assert (B == 0).float().mean() == 0.5
    assert torch.allclose(model[0](x), expected(model[0], x, A, B), atol=1e-4)
    prune.remove(model[0].lora_B["default"], "weight")
    assert torch.allclose(model[0](x), expected(model[0], x, A, B), atol=1e-4)


def test_dropout_dtypes_and_autocast():
    model = net(lora_dropout=0.5, adapter_dtype=torch.bfloat16).train()
    layer, x = model[0], torch.ones(2000, 64)
    plain = layer(x).detach()
    layer.lora_B["default"].register_forward_hook(lambda module, args, out: None)
    called = layer(x)
    assert called.dtype == x.dtype and called.std(0).max() > 0  # rows are dropped differently
    bound = 6 * called.std(0) * (2 / len(x)) ** 0.5  # of the difference of two means
    assert ((called.mean(0) - plain.mean(0)).abs() < bound).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    model.eval()
    assert layer(x).std(0).max() < 1e-5


def test_offloading_with_accelerate():
    accelerate = pytest.importorskip("accelerate", reason=WHY)
    model, x = net(), torch.randn(5, 64)
    with torch.no_grad():
        wanted = model(x)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert model[0].lora_A["default"].weight.is_meta
        for _ in range(2):
            assert torch.allclose(model(x), wanted, atol=1e-5)
        with pytest.raises(
            RuntimeError, match="merge: lora_A or lora_B of adapter 'default' has hooks"
        ):
            model[0].merge()
        accelerate.hooks.remove_hook_from_submodules(model)
        assert torch.equal(model(x), wanted)


def test_offloaded_adapters_are_not_lost_in_files(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason=WHY)
    model = net()
    lk.save_adapter(model, tmp_path / "before")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"name: 0\.lora_A: expected a parameter with data.*remove_hook"
    ):
        lk.save_adapter(model, tmp_path / "offloaded")
    assert not (tmp_path / "offloaded").exists()
    with pytest.raises(ValueError, match="expected a layer with data, got one on the meta device"):
        lk.load_adapter(model, tmp_path / "before")
    accelerate.hooks.remove_hook_from_submodules(model)
    lk.save_adapter(model, tmp_path / "after")
    first, second = ((tmp_path / n / "adapter_model.safetensors") for n in ("before", "after"))
    assert first.read_bytes() == second.read_bytes()


def test_loading_into_a_computed_weight_is_refused(tmp_path):
    model = net()
    lk.save_adapter(model, tmp_path)
    _parametrized(model[0].lora_A["default"], None)
    with pytest.raises(ValueError, match=r"name: 0: adapter 'default' computes its weight"):
        lk.load_adapter(model, tmp_path)
    lk.load_adapter(model, tmp_path, "other")


@pytest.mark.parametrize("change", [_forward_hook, _replaced_forward, _parametrized])
def test_a_plan_refuses_them(change):
    model = net()
    bank = lk.AdapterBank.for_model(model, num_pages=2)
    change(model[0].lora_A["default"], model[0].lora_B["default"])
    with pytest.raises(RuntimeError, match="adapter 'default' has hooks or is parametrized"):
        bank.load("default")
    assert bank.free_pages == 2


@pytest.mark.parametrize("change", [_forward_hook, _replaced_forward])
def test_a_plan_refuses_what_came_after_loading(change):
    model = net()
    bank = lk.AdapterBank.for_model(model, num_pages=2)
    bank.load("default")
    plan = bank.plan(["default"], tokens_per_sequence=[5])
    change(model[0].lora_A["default"], model[0].lora_B["default"])
    with pytest.raises(RuntimeError, match="adapter 'default' has hooks or is parametrized"):
        with bank.using(plan):
            pass


def test_without_hooks_the_layer_is_one_operator(monkeypatch):
    model = net()
    monkeypatch.setattr(LoRALinear4bit, "_by_calls", None)
    model(torch.randn(5, 64))
    handle = model[0].lora_A["default"].register_forward_hook(lambda module, args, out: None)
    with pytest.raises(TypeError, match="not callable"):
        model(torch.randn(5, 64))
    handle.remove()
    model(torch.randn(5, 64))
