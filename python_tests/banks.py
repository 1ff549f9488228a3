"""A small model with adapters of different ranks, as the tests of banks and plans use it."""

from __future__ import annotations

import torch
from torch import nn

import lowrank_kernels as lk

RANKS = {"a": 4, "b": 20, "c": 1}


class Tiny(nn.Module):
    """Two layers of different shapes, a part that is no adapter's, and a head that stays dense."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.inner = nn.Sequential(nn.ReLU(), nn.Linear(96, 64, bias=False))
        self.lm_head = nn.Linear(64, 10)

    def forward(self, x):
        return self.lm_head(torch.tanh(self.inner(self.up(x))))


def layers(model: nn.Module) -> dict[str, lk.LoRALinear4bit]:
    return {n: m for n, m in model.named_modules() if isinstance(m, lk.LoRALinear4bit)}


def make_model() -> Tiny:
    """With adapters of ``RANKS``, whose B is not zero, and scaling lora_alpha / r."""
    model = Tiny()
    lk.replace_linear(model, r=RANKS["a"], lora_alpha=8, adapter_name="a", progress=False)
    for layer in layers(model).values():
        layer.add_adapter("b", RANKS["b"], lora_alpha=10)
        layer.add_adapter("c", RANKS["c"], lora_alpha=3)
        for name in RANKS:
            nn.init.normal_(layer.lora_B[name].weight, std=0.5)
    return model


def make_bank(model: Tiny) -> lk.AdapterBank:
    """With all of the model's own adapters."""
    bank = lk.AdapterBank.for_model(model, num_pages=12)
    for name in RANKS:
        bank.load(name)
    return bank


def alone(model: nn.Module, name: str | None, x: torch.Tensor) -> torch.Tensor:
    """The model with one adapter, or none, the ordinary way."""
    for layer in layers(model).values():
        layer.disable_adapters() if name is None else layer.set_adapter(name)
    y = model(x)
    for layer in layers(model).values():
        layer.enable_adapters()
    return y


def expected_delta(bank, module: str, names: list[str | None], x: torch.Tensor) -> torch.Tensor:
    """What ``multi_lora_`` adds, row by row in float64, from the model's own parameters."""
    layer = bank[module].owner.layer
    rows = []
    for name, row in zip(names, x.double()):
        if name is None:
            rows.append(torch.zeros(layer.out_features, dtype=torch.float64))
            continue
        A, B = (p.detach().double() for p in layer.adapter_parameters(name))
        rows.append(layer.scaling[name] * (B @ (A @ row)))
    return torch.stack(rows)
