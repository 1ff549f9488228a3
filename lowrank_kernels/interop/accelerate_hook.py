"""``accelerate.load_checkpoint_in_model`` on a model with 4-bit layers: the entries of a weight are put together.

accelerate sets the tensors of a checkpoint one by one, each as a parameter or buffer of that name. Those of a 4-bit
weight (``weight``, ``weight.absmax``, ...) wait at their layer until all of them are there. Outside of a load (where
its hooks bring offloaded parameters in) accelerate sets them as it always does.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
from types import ModuleType

import torch
from torch import nn

from ..linear4bit import Linear4bit

_WAITING = "_entries_of_a_checkpoint"
_loading = contextvars.ContextVar("load_checkpoint_in_model is running", default=False)


def install(modeling: ModuleType) -> None:
    """When accelerate.utils.modeling has been imported."""
    set_tensor, load = modeling.set_module_tensor_to_device, modeling.load_checkpoint_in_model
    if set_tensor.__module__ != modeling.__name__:
        return

    @functools.wraps(set_tensor)
    def set_module_tensor_to_device(module, tensor_name, device, value=None, *args, **kwargs):
        layer, path = None, ""
        if value is not None and _loading.get():
            layer, path = _layer_of(module, tensor_name)
        if layer is None:
            return set_tensor(module, tensor_name, device, value, *args, **kwargs)
        _take(layer, path, tensor_name, value.to(device))

    @functools.wraps(load)
    def load_checkpoint_in_model(model, *args, **kwargs):
        before = _loading.set(True)
        try:
            result = load(model, *args, **kwargs)
        finally:
            _loading.reset(before)
        for name, layer in model.named_modules():
            if (entries := vars(layer).pop(_WAITING, None)) is not None:
                layer._read_weight(entries, f"{name}.weight")  # says what is missing
        return result

    set_module_tensor_to_device.__module__ = load_checkpoint_in_model.__module__ = __name__
    modeling.set_module_tensor_to_device = set_module_tensor_to_device
    modeling.load_checkpoint_in_model = load_checkpoint_in_model


def _layer_of(module: nn.Module, tensor_name: str) -> tuple[Linear4bit | None, str]:
    """The 4-bit layer that an entry of a weight belongs to, and its path."""
    path, dot, rest = f".{tensor_name}".rpartition(".weight")
    if not dot or (rest and not rest.startswith(".")):
        return None, ""
    path = path.lstrip(".")
    try:
        layer = module.get_submodule(path)
    except AttributeError:
        return None, ""
    return (layer, path) if isinstance(layer, Linear4bit) else (None, "")


def _take(layer: Linear4bit, path: str, key: str, value: torch.Tensor) -> None:
    name = f"{path}.weight" if path else "weight"
    entries = vars(layer).setdefault(_WAITING, {})
    entries[key] = value
    dense = value.is_floating_point() and tuple(value.shape) == tuple(layer.weight4bit.shape)
    if key != name or not dense:
        try:
            weight = layer._read_weight(entries, name)
        except (ValueError, TypeError):
            return  # not all of them yet
    else:
        weight = layer._read_weight({name: value}, name)
    del vars(layer)[_WAITING]
    copies = {field: tensor.clone() for field, tensor in weight.tensors().items()}
    layer._set_weight4bit(dataclasses.replace(weight, **copies))
