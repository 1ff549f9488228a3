"""One adapter of one layer: its settings and its two matrices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
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


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """What a caller asks of a new adapter, checked; the one place of the defaults.

    ``init_lora_weights``: True draws A Kaiming-uniform (a = sqrt 5), "gaussian" with standard deviation
    1/r, and both set B = 0; False leaves both as nn.Linear draws them. ``adapter_dtype`` None is float32,
    also over a 16-bit base. Raises ValueError or TypeError naming the argument.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    adapter_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        r, lora_alpha, lora_dropout = self.r, self.lora_alpha, self.lora_dropout
        if type(r) is not int or r < 1:
            raise ValueError(f"r: expected an integer >= 1, got {r!r}")
        if not _is_number(lora_alpha) or not math.isfinite(lora_alpha):
            raise ValueError(f"lora_alpha: expected a finite number, got {lora_alpha!r}")
        if not _is_number(lora_dropout) or not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"lora_dropout: expected 0 <= lora_dropout < 1, got {lora_dropout!r}")
        if not isinstance(self.use_rslora, bool):
            raise ValueError(f"use_rslora: expected True or False, got {self.use_rslora!r}")
        init = self.init_lora_weights
        if not isinstance(init, bool) and init != "gaussian":
            raise ValueError(f"init_lora_weights: expected True, False or 'gaussian', got {init!r}")
        if self.adapter_dtype is not None and self.adapter_dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"adapter_dtype: expected float32, bfloat16 or float16, got {self.adapter_dtype}"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
    """What the functions below read of a layer with named adapters."""

    r: Mapping[str, int]
    lora_alpha: Mapping[str, float]
    lora_dropout: Mapping[str, float]
    use_rslora: Mapping[str, bool]

    def adapter_parameters(self, name: str) -> tuple[torch.Tensor, torch.Tensor]: ...

    def adapter_modules(self, name: str) -> tuple[nn.Module, nn.Module]: ...


def layer_of(layer: HasAdapters, name: str) -> AdapterLayer:
    """Adapter ``name`` as the layer has it, to be used by its parameters A and B alone.

    Raises RuntimeError where A and B are more than that.
    """
    check_fused(layer, name)
    settings = (f[name] for f in (layer.r, layer.lora_alpha, layer.lora_dropout, layer.use_rslora))
    return AdapterLayer(*settings, *layer.adapter_parameters(name))


def is_bare(module: nn.Module) -> bool:
    """Calling ``module`` runs its class's forward and nothing else: no hooks, of accelerate either."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or (
            "forward" in module.__dict__
            and not _is_forward_of_class(module, module.__dict__["forward"])
        )
    )


def _is_forward_of_class(module: nn.Module, forward: object) -> bool:
    """What accelerate leaves behind when its hooks are removed: the class's forward, as an attribute."""
    return getattr(forward, "__func__", None) is type(module).forward


def are_fused(A: nn.Module, B: nn.Module) -> bool:
    """Whether A and B are plain linear layers, whose weights may be used without calling them.

    They are not with hooks (of offloading, of ZeRO-3, a user's own), parametrizations, weight norm or pruning.
    """
    for module in (A, B):  # is_bare() of each, without a call: every forward asks
        if (
            type(module) is not nn.Linear
            or module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or ("forward" in module.__dict__ and not is_bare(module))
        ):
            return False
    return True


def check_fused(layer: HasAdapters, name: str) -> None:
    """Raises RuntimeError where A and B of adapter ``name`` are more than their weights."""
    if not are_fused(*layer.adapter_modules(name)):
        raise RuntimeError(
            f"name: lora_A or lora_B of adapter {name!r} has hooks or is parametrized, and an AdapterBank reads "
            "its parameters alone; remove them, or load a copy from a file or a state dict"
        )


def train_only(layer: HasAdapters, names: Collection[str]) -> None:
    """Of all adapters of ``layer`` only ``names`` require gradients from now on.

    ``set_adapter`` and :meth:`AdapterBank.trainable` both come here: one for the active adapter, the other
    for all that train together under a plan. The later call wins.
    """
    for name in layer.r:
        for module in layer.adapter_modules(name):
            module.requires_grad_(name in names)
