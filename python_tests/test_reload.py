"""Adapters do not vanish when a model is saved and loaded by torch's own means."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import lowrank_kernels as lk

X = torch.linspace(-1, 1, 64).repeat(3, 1)


def net(r=4, **arguments) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    lk.replace_linear(model, progress=False, r=r, **({"init_lora_weights": False} | arguments))
    return model.eval()


@pytest.mark.parametrize("r", [0, 4])
def test_torch_save_of_the_model(r):
    model = net(r)
    if r:
        lk.add_adapter(model, "second", r=2, lora_alpha=3, init_lora_weights=False)
        lk.set_adapter(model, "second")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    back = torch.load(file, weights_only=False)
    assert torch.equal(back(X), model(X)) and torch.equal(copy.deepcopy(model)(X), model(X))
    if r:
        lk.set_adapter(back, "default")
        assert not torch.equal(back(X), model(X))
        lk.set_adapter(model, "default")
        assert torch.equal(back(X), model(X))


@pytest.mark.parametrize("assign", [False, True])
def test_torch_save_of_the_state_dict(assign):
    model, other = net(), net()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("target", [0, "another"])
def test_adapters_that_the_model_lacks(target):
    """An error, or with strict=False a warning that names them."""
    model = net()
    other = net(0) if target == 0 else net(adapter_name=target)
    with (
        pytest.raises(RuntimeError, match=r"Unexpected key.*0\.lora_A\.default\.weight"),
        pytest.warns(UserWarning, match="are not loaded"),
    ):
        other.load_state_dict(model.state_dict())
    with pytest.warns(
        UserWarning, match=r"the adapters \['default'\] of the state dict are not loaded"
    ):
        found = other.load_state_dict(model.state_dict(), strict=False)
    assert "0.lora_A.default.weight" in found.unexpected_keys


def test_a_state_dict_without_adapters():
    """The base is loaded and the model keeps its own adapters; strictly it is an error."""
    base, model = net(0), net()
    A = model[0].lora_A["default"].weight.clone()
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.lora_A\.default\.weight"):
        model.load_state_dict(base.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(base.state_dict(), strict=False)
    assert torch.equal(model[0].lora_A["default"].weight, A)
    with lk.disable_adapters(model):
        assert torch.equal(model(X), base(X))


def test_another_rank_is_an_error():
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.lora_A\.default\.weight"):
        net(8).load_state_dict(net(4).state_dict())
