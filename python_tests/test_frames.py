"""How straight a call is: the Python frames of this library that one forward of a layer takes."""

from __future__ import annotations

import os
import sys

import pytest
import torch

import lowrank_kernels as lk

MOST = 12
HOME = os.path.dirname(lk.__file__)


def frames(call) -> list[str]:
    seen = []

    def note(frame, event, arg):
        if event == "call" and frame.f_code.co_filename.startswith(HOME):
            seen.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


def layers() -> dict[str, torch.nn.Module]:
    lora = lk.LoRALinear4bit(64, 32, r=4, lora_dropout=0.1)
    lora.add_adapter("other", r=2, lora_dropout=0.1)
    return {"linear": lk.Linear4bit(64, 32), "lora": lora}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", ["linear", "lora", "plan"])
def test_at_most_twelve(kind, train, grad):
    """Under a plan: with two adapters of the model's own."""
    layer = layers()["linear" if kind == "linear" else "lora"].train(train)
    x = torch.randn(2, 64, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        if kind != "plan":
            names = frames(lambda: layer(x))
        else:
            bank = lk.AdapterBank({"layer": layer}, num_pages=2)
            bank.load("default")
            bank.load("other")
            bank.trainable("default", "other")
            with bank.using(bank.plan(["default", "other"])):
                names = frames(lambda: layer(x))
    assert 4 < len(names) <= MOST, names
