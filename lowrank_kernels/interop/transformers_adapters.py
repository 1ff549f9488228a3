"""Adapters of :class:`LoRALinear4bit` in a checkpoint of a whole model, as save_pretrained writes it.

Their tensors are in the state dict. The quantization_config has an entry for each kind of adapter, ``{"name", "r",
"lora_alpha", "lora_dropout", "use_rslora", "dtype", "active", "layers"}``, from which from_pretrained makes the layers.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..adapter import lora_scaling
from ..codebooks import DTYPES
from ..linear4bit import Linear4bit
from ..nn import LoRALinear4bit
from .transformers_config import ADAPTER_FIELDS


def adapters_of(layers: dict[str, Linear4bit]) -> list[dict]:
    """The adapters of a model's layers, for config.json."""
    groups: dict[tuple, list[str]] = {}
    for path, layer in layers.items():
        if not isinstance(layer, LoRALinear4bit):
            continue
        if layer.merged:
            raise RuntimeError(
                f"save_pretrained: {path} is merged; call unmerge_adapter() first, or save the adapter alone"
            )
        for name in layer.r:
            A, _ = layer.whole_adapter(name)
            settings = (name, layer.r[name], layer.lora_alpha[name], layer.lora_dropout[name])
            flags = (layer.use_rslora[name], str(A.dtype).removeprefix("torch."))
            key = (*settings, *flags, layer.active_adapter == name)
            groups.setdefault(key, []).append(path)
    return [dict(zip(ADAPTER_FIELDS, (*key, paths))) for key, paths in groups.items()]


def prepare(model: nn.Module, adapters: list[dict]) -> set[str]:
    """Gives the dense layers of ``model``, which is on the meta device, places for the adapters that are read.

    The names of their parameters.
    """
    places = set()
    for entry in adapters:
        for path in entry["layers"]:
            layer = dict(model.named_modules()).get(path)
            if type(layer) not in (nn.Linear, Conv1D):
                raise ValueError(
                    f"quantization_config: adapters: {path}: expected a linear layer of the model, "
                    f"got {'none' if layer is None else type(layer).__name__}"
                )
            rows, columns = shape_of(layer)
            name, r = entry["name"], entry["r"]
            factory = {"bias": False, "device": "meta", "dtype": DTYPES[entry["dtype"]]}
            for part, sizes in (("lora_A", (columns, r)), ("lora_B", (r, rows))):
                if part not in layer._modules:
                    setattr(layer, part, nn.ModuleDict())
                getattr(layer, part)[name] = nn.Linear(*sizes, **factory)
                places.add(f"{path}.{part}.{name}.weight")
    return places


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of an nn.Linear or a Conv1D."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features


def check_present(path: str, layer: nn.Module, missing: Collection[str]) -> None:
    """Raises ValueError if the checkpoint lacks a matrix of an adapter of ``layer``."""
    for part in ("lora_A", "lora_B"):
        for name in getattr(layer, part, ()):
            if (key := f"{path}.{part}.{name}.weight") in missing:
                raise ValueError(f"{key}: in quantization_config, but not in the checkpoint")


def take_over(new: LoRALinear4bit, old: nn.Module) -> None:
    """The places of :func:`prepare`, filled or yet to be, become those of the 4-bit layer."""
    new.lora_A, new.lora_B = old.lora_A, old.lora_B


def finish(model: nn.Module, adapters: list[dict]) -> None:
    """After loading: the settings of the adapters."""
    for entry in adapters:
        name = entry["name"]
        for path in entry["layers"]:
            layer = model.get_submodule(path)
            if not isinstance(layer, LoRALinear4bit):
                raise ValueError(
                    f"quantization_config: adapters: {path}: expected a layer in 4 bits in the checkpoint, "
                    f"got a {type(layer).__name__}"
                )
            layer.r[name], layer.lora_alpha[name] = entry["r"], entry["lora_alpha"]
            layer.lora_dropout[name] = float(entry["lora_dropout"])
            layer.use_rslora[name] = bool(entry["use_rslora"])
            layer.scaling[name] = lora_scaling(entry["r"], entry["lora_alpha"], entry["use_rslora"])
    actives = {p: e["name"] for e in adapters if e["active"] for p in e["layers"]}
    for path in {path for entry in adapters for path in entry["layers"]}:
        layer = model.get_submodule(path)
        for name in layer.r:
            for parameter in layer.adapter_parameters(name):
                parameter.requires_grad_(False)
        if path in actives:
            layer.set_adapter(actives[path])
