"""Small models under PEFT: with 4-bit layers, and the same with dense layers, which PEFT serves itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
from banks import Tiny

peft = pytest.importorskip("peft", reason="these are tests of the layers under the real PEFT")

from lowrank_kernels.interop.peft_layer import PeftLinear4bit  # noqa: E402

LINEAR = {"target_modules": ["up", "inner.1"], "init_lora_weights": False}


def base(dtype: torch.dtype = torch.float32) -> Tiny:
    """``Tiny`` with 4-bit layers but for its head."""
    model = Tiny().to(dtype)
    lk.replace_linear(model, r=0, progress=False)
    return model


def dense(model: nn.Module) -> nn.Module:
    """A copy whose layers are dense, with the values of the 4-bit ones."""
    model = copy.deepcopy(model)
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, lk.Linear4bit):
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            linear.weight.data = layer.dequantize(torch.float32)
            if layer.bias is not None:
                linear.bias.data = layer.bias.data.float()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    return model


def wrapped(model: nn.Module | None = None, name: str = "default", **config) -> peft.PeftModel:
    return peft.get_peft_model(
        base() if model is None else model, peft.LoraConfig(**LINEAR | config), adapter_name=name
    )


def pair(**config) -> tuple[peft.PeftModel, peft.PeftModel]:
    """(the 4-bit model with an adapter, the dense one with the same), both float32."""
    model = base()
    theirs = wrapped(dense(model), **config)
    ours = wrapped(model, **config)
    same_adapter(ours, theirs, "default")
    return ours, theirs


def add(models, name: str, **config) -> None:
    """One more adapter of the same values for each model."""
    for model in models:
        model.add_adapter(name, peft.LoraConfig(**LINEAR | config))
        same_adapter(models[0], model, name)


def same_adapter(source: nn.Module, target: nn.Module, name: str) -> None:
    state = peft.get_peft_model_state_dict(source, adapter_name=name)
    peft.set_peft_model_state_dict(target, copy.deepcopy(state), adapter_name=name)


def layers(model: nn.Module) -> list[PeftLinear4bit]:
    found = [module for module in model.modules() if isinstance(module, PeftLinear4bit)]
    assert found, "PEFT should have made our layers"
    return found


def packed(model: nn.Module) -> list[torch.Tensor]:
    """All bytes of the 4-bit weights, copied."""
    weights = [m.weight4bit for m in model.modules() if isinstance(m, lk.Linear4bit)]
    tensors = [t.detach().clone() for w in weights for t in w.tensors().values()]
    return [t.reshape(-1).view(torch.uint8) for t in tensors]


def assert_same_packed(model: nn.Module, before: list[torch.Tensor]) -> None:
    after = packed(model)
    assert before and len(before) == len(after)
    assert all(map(torch.equal, before, after))


def assert_near(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-4, atol=1e-5), (a - b).abs().max()
