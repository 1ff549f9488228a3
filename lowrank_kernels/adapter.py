"""One adapter of one layer: its settings, its two matrices, and the checks of what a caller asks for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from .schema import FLOAT_DTYPES


def check_adapter_name(name: object) -> None:
    """It becomes a key of an nn.ModuleDict, which refuses dots and its own attributes ("keys")."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"name: expected a non-empty string without '.' that is no attribute of nn.ModuleDict, "
            f"got {name!r}"
        )


def lora_scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` for rsLoRA."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def check_adapter(r, lora_alpha, lora_dropout, init_lora_weights, adapter_dtype) -> None:
    if type(r) is not int or r < 1:
        raise ValueError(f"r: expected an integer >= 1, got {r!r}")
    if not isinstance(lora_alpha, int | float) or not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha: expected a finite number, got {lora_alpha!r}")
    if not isinstance(lora_dropout, int | float) or not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout: expected 0 <= lora_dropout < 1, got {lora_dropout!r}")
    if init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"init_lora_weights: expected True, False or 'gaussian', got {init_lora_weights!r}"
        )
    if adapter_dtype is not None and adapter_dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"adapter_dtype: expected float32, bfloat16 or float16, got {adapter_dtype}"
        )


@dataclasses.dataclass
class AdapterLayer:
    """An adapter of one layer: A ``[r, K]`` and B ``[N, r]``, and how they are applied."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    A: torch.Tensor | None = None
    B: torch.Tensor | None = None

    @property
    def scaling(self) -> float:
        return lora_scaling(self.r, self.lora_alpha, self.use_rslora)


class HasAdapters(Protocol):
    """What :func:`layer_of` reads of a layer with named adapters."""

    r: Mapping[str, int]
    lora_alpha: Mapping[str, float]
    lora_dropout: Mapping[str, float]
    use_rslora: Mapping[str, bool]

    def adapter_parameters(self, name: str) -> tuple[torch.Tensor, torch.Tensor]: ...


def layer_of(layer: HasAdapters, name: str) -> AdapterLayer:
    """Adapter ``name`` as the layer has it; A and B are its parameters."""
    settings = (f[name] for f in (layer.r, layer.lora_alpha, layer.lora_dropout, layer.use_rslora))
    return AdapterLayer(*settings, *layer.adapter_parameters(name))
