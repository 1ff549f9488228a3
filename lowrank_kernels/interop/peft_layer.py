"""PEFT's LoRA layer over ``Linear4bit``: what ``get_peft_model`` makes of one, without registration.

Imported by peft_hook.py, when PEFT meets the first such layer.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from peft.tuners.lora import layer as peft_lora
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional as F

from ..adapter import are_fused, is_bare
from ..adapter_format import INITIALISATIONS
from ..functional import linear_4bit, lora_linear_4bit
from ..groups import Lora
from ..linear4bit import Linear4bit
from ..multi_lora.in_force import in_force
from ..multi_lora.pages import save_plainly
from ..nn import LoRALinear4bit
from ..ragged import is_ragged
from ..shared_input import Operands, opened, shared_output
from .peft_methods import dense_base
from .peft_mixed import Parts, can_move, mixed_batch

_VARIANTS = {
    "use_dora", "alora_invocation_tokens", "arrow_config", "monteclora_config", "use_bdlora", "velora_config",
}  # fmt: skip
# Initialisations and variants that read the base weight (MiCA its singular vectors) or only its dtype (the blocks of
# BD-LoRA, VeLoRA's projection), and change nothing of it: they see a dense copy meanwhile.
_READING = ("mica", "orthogonal", "use_bdlora", "velora_config")
_REFUSED = {
    "kasa_config": "replaces the base weight by one of lower rank, and a Linear4bit keeps its bytes",
    "use_qalora": "is implemented by PEFT for GPTQ's layers alone and would be ignored here",
}


class PeftLinear4bit(peft_lora.Linear):
    """PEFT's ``lora.Linear`` whose base layer is a :class:`Linear4bit`.

    Everything that PEFT does with such a layer, but: base and adapter are one operator each way, a batch of
    mixed adapters too; merging quantizes ``W + Σ scaling · B A`` once and keeps the original, which ``unmerge``
    restores bit by bit. Variants (DoRA, aLoRA, ...) and layers with hooks go PEFT's own way.

    Raises ValueError, as an adapter is added, for initialisations and variants that change the base weight.
    """

    _merges_into_4_bits = True  # for peft_methods.py

    def __init__(self, base_layer, adapter_name: str, config, **kwargs) -> None:
        self._mixed_adapters: dict[torch.dtype, Any] = {}  # of peft_mixed.py
        self._bias_aside: torch.Tensor | None = None
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.register_state_dict_post_hook(save_plainly)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config, **kwargs) -> None:
        _check_config(config)
        arguments = {"lora_alpha": lora_alpha, "config": config, **kwargs}
        if not _reads_base(config):
            return super().update_layer(adapter_name, r, **arguments)
        with dense_base(self):
            super().update_layer(adapter_name, r, **arguments)

    def forget_pages(self) -> None:
        """Gives the adapters, which live in pages since a batch with mixed adapters, memory of their own again.

        The next such batch makes new pages.
        """
        for adapters in self._mixed_adapters.values():
            adapters.release()
        self._mixed_adapters = {}

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.forget_pages()

    # -- forward -----------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[..., in_features] -> [..., out_features]`` in x's dtype, adapters of any dtype."""
        if entries := in_force.entries:
            state = self._state(kwargs.get("adapter_names"))
            for entry in entries:
                if entry.records:
                    entry.note(self, state)
        if not (args or kwargs or self._disable_adapters or self.merged_adapters):
            parts = self.plain_parts(self.active_adapters)
            if parts is not None:
                if opened.scopes and (y := shared_output(self, x)) is not None:
                    return y
                return self._fused(x, [*parts.values()])
        elif kwargs.get("adapter_names") is not None and is_ragged(x):
            raise TypeError(
                "x: expected a dense tensor where adapter_names are given, got a nested one (an AdapterBank "
                "takes those)"
            )
        return super().forward(x, *args, **kwargs)

    def operands(self) -> Operands | None:
        """What the forward computes with, for layers that share their input; None where that is not one operator."""
        if self._disable_adapters or self.merged_adapters:
            return None
        parts = self.plain_parts(self.active_adapters)
        if parts is None or len(parts) > 1:
            return None
        base = self._modules["base_layer"]
        w, bias = base.weight4bit, base._parameters["bias"]
        if not parts:
            return Operands(w, bias)
        (part,) = parts.values()
        if part.bias is not None or isinstance(part.scaling, torch.Tensor):
            return None
        return Operands(w, bias, Lora(part.A, part.B, part.scaling, part.dropout_p))

    def _state(self, adapter_names: list[str] | None) -> tuple:
        """What decides about y beside tensors: the adapters of the batch, disabled, merged, probability of dropout."""
        names = tuple(self.active_adapters if adapter_names is None else adapter_names)
        dropout = {
            name: module.p
            for name, module in self.lora_dropout.items()
            if name in names and isinstance(module, nn.Dropout) and module.training
        }
        return names, self.disable_adapters, tuple(self.merged_adapters), dropout

    def _mixed_batch_forward(self, x, *args, adapter_names: list[str], **kwargs):
        if not args and all(value is None for value in kwargs.values()):
            parts = self.plain_parts(dict.fromkeys(adapter_names))
            if (
                parts is not None
                and all(part.bias is None for part in parts.values())
                and can_move(parts, self.base_layer.weight.device)
            ):
                return mixed_batch(self, x, adapter_names, parts)
        return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)

    def plain_parts(self, names) -> dict[str, Parts] | None:
        """Those of ``names`` that the layer has; None if for one of them only PEFT's own way is right."""
        modules = self._modules  # past Module.__getattr__, which is slow
        base = modules["base_layer"]
        if type(base).forward is not Linear4bit.forward or not is_bare(base):
            return None
        found = {}
        for name in names:
            if name not in modules["lora_A"]._modules:
                continue
            if (part := self.plain_part(name)) is None:
                return None
            found[name] = part
        return found

    def plain_part(self, name: str) -> Parts | None:
        """Adapter ``name``; None if only PEFT's own way is right for it."""
        modules = self._modules
        A, B, dropout = (
            modules[part]._modules[name] for part in ("lora_A", "lora_B", "lora_dropout")
        )
        if name in self.lora_variant or not are_fused(A, B):
            return None
        if type(dropout) not in (nn.Identity, nn.Dropout):
            return None
        if not is_bare(dropout):
            return None
        p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
        if p >= 1.0:
            return None
        B, bias = B._parameters["weight"], B._parameters["bias"]
        return Parts(A._parameters["weight"], B, self.scaling[name], p, bias)

    def _fused(self, x: torch.Tensor, parts: list[Parts]) -> torch.Tensor:
        base = self._modules["base_layer"]
        w, bias = base.weight4bit, base._parameters["bias"]
        if not parts:
            return linear_4bit(x, w, bias)
        for part in parts:
            if part.bias is not None:
                own = part.bias.float() * part.scaling
                bias = own if bias is None else bias + own
        (A, B, scaling, p, _), *rest = parts
        if rest and not any(part.dropout_p for part in parts):
            # Adapters that see the same x are one adapter of all their ranks.
            A = torch.cat([part.A for part in parts])
            B = torch.cat([part.B.float() * part.scaling for part in parts], 1)
            scaling, rest = 1.0, []
        elif isinstance(scaling, torch.Tensor):  # PEFT's hotswapping makes it one
            B, scaling = B.float() * scaling, 1.0
        y = result = lora_linear_4bit(x, w, A, B, scaling, bias, p)
        for A, B, scaling, p, _ in rest:
            result = result + F.linear(F.linear(F.dropout(x.to(A.dtype), p), A), B) * scaling
        return result.to(y.dtype)

    # -- merging -----------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Quantizes ``W + Σ scaling · B A`` of all merged adapters with W's settings; keeps W aside.

        W is the original weight, also where adapters are merged one after another. The merged layer is near,
        not equal to, the unmerged one. Needs float32 ``[N, K]`` temporaries. What is not finite is refused with
        or without ``safe_merge``, since 4 bits cannot hold it; the layer is then as it was.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.lora_A]
        if not names:
            return
        base, everything = self.get_base_layer(), [*self.merged_adapters, *names]
        bias = self._merged_bias(base, everything)
        base._merge_weight(lambda W: self._merged_weight(W, everything))
        if bias is not None:
            if self._bias_aside is None:
                self._bias_aside = base.bias.detach().clone()
            base.bias.data.copy_(bias)
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Restores the original bytes, and the bias, exactly."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        if base.merged:
            base._unmerge_weight()
        if self._bias_aside is not None:
            base.bias.data.copy_(self._bias_aside)
            self._bias_aside = None
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> Linear4bit:
        """The base layer without this one, for PEFT's ``unload`` and ``merge_and_unload``."""
        if merge:
            self.merge(safe_merge, adapter_names)
        base = self.get_base_layer()
        base._unmerged = None  # nobody is left to restore it
        return base

    def _merged_weight(self, W: torch.Tensor, names: list[str]) -> torch.Tensor:
        original = W.clone() if any(name in self.lora_variant for name in names) else W
        for name in names:
            variant = self.lora_variant.get(name)
            if variant is None:
                A, B = self.lora_A[name].weight.float(), self.lora_B[name].weight.float()
                W.addmm_(B, A, alpha=float(self.scaling[name]))
            elif isinstance(variant, DoraLinearVariant):
                delta = self.get_delta_weight(name).float()
                magnitude = self.lora_magnitude_vector[name]
                norm = magnitude.get_weight_norm(original, delta, scaling=1)
                W = (magnitude.weight.float() / norm).view(-1, 1) * (W + delta)
            else:
                with dense_base(self):  # for its dtype
                    W = variant.merge_safe(self, name, W)  # raises for what cannot be merged
            if not W.isfinite().all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
        return W

    def _merged_bias(self, base: Linear4bit, names: list[str]) -> torch.Tensor | None:
        names = [name for name in names if self.lora_bias[name]]
        if not names:
            return None
        if base.bias is None:
            raise RuntimeError(
                f"merge: {names} have lora_bias=True, which cannot be merged: the base layer has no bias"
            )
        bias = (base.bias if self._bias_aside is None else self._bias_aside).detach().float()
        for name in names:
            bias = bias + self.lora_B[name].bias.detach().float() * float(self.scaling[name])
        if not bias.isfinite().all():
            raise ValueError(f"merge: expected finite biases, those of {names} are not")
        return bias


def why_not(layer: nn.Module) -> str | None:
    """Why an existing LoRA layer of PEFT cannot go over to a Linear4bit as its base; None if it can."""
    if type(layer) is not peft_lora.Linear:
        return "only PEFT's LoRA layers over torch.nn.Linear go over to a Linear4bit"
    for name, variant in layer.lora_variant.items():
        if not isinstance(variant, DoraLinearVariant):
            return f"adapter {name!r} is a {type(variant).__name__}"
    return None


def adopt(layer: peft_lora.Linear) -> None:
    """Makes a :class:`PeftLinear4bit` of a LoRA layer whose base has become a Linear4bit; its adapters stay."""
    layer.__class__ = PeftLinear4bit
    layer._mixed_pages = layer._bias_aside = None


def _init_of(config) -> object:
    init = config.init_lora_weights
    return init.lower() if isinstance(init, str) else init


def _reads_base(config) -> bool:
    """Whether making the adapter reads the base layer's weight, or its dtype, as that of a dense layer."""
    return _init_of(config) in _READING or any(getattr(config, name, None) for name in _READING)


def _check_config(config) -> None:
    init = _init_of(config)
    if init not in INITIALISATIONS:
        raise ValueError(
            f"init_lora_weights: expected one of {INITIALISATIONS}, got {init!r}, which changes the base "
            "weight; a Linear4bit keeps its bytes (an adapter trained that way can be converted: see PEFT's "
            "path_initial_model_for_weight_conversion)"
        )
    variants = [f.name for f in dataclasses.fields(config) if f.metadata.get("is_lora_variant")]
    # Older versions do not mark use_bdlora as a variant.
    for name in {*variants, *_REFUSED} - _VARIANTS:
        if value := getattr(config, name, None):
            reason = _REFUSED.get(name, "was not tested on a Linear4bit")
            raise ValueError(
                f"{name}: expected it unset, got {value!r}; it {reason}. On a Linear4bit {sorted(_VARIANTS)} work"
            )


def dispatch(target: nn.Module, adapter_name: str, config, **kwargs) -> PeftLinear4bit:
    """The LoRA layer for ``target``, whose base is a Linear4bit.

    Raises ValueError for a LoRALinear4bit, for target_parameters, and as :meth:`PeftLinear4bit.update_layer`.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, LoRALinear4bit):
        raise ValueError(
            f"target_modules: expected Linear4bit layers (replace_linear with r=0), got a LoRALinear4bit, which "
            f"has adapters of its own: {list(base.r)}"
        )
    if (name := kwargs.pop("parameter_name", None)) is not None:
        raise ValueError(
            f"target_parameters: expected dense parameters, got {name!r} of a Linear4bit, which is packed in 4 "
            "bits; name the layer in target_modules"
        )
    if config.fan_in_fan_out:
        warnings.warn(
            "fan_in_fan_out is True but the target is a Linear4bit; set to False", stacklevel=2
        )
        config.fan_in_fan_out = False
    return PeftLinear4bit(target, adapter_name, config=config, **kwargs)
