"""``LoRALinear4bit``: a 4-bit linear layer with named LoRA adapters, on top of ``Linear4bit``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .adapter import AdapterSettings, are_fused
from .functional import linear, linear_4bit, lora, taken
from .groups import Lora
from .linear4bit import Linear4bit
from .multi_lora.functional import multi
from .multi_lora.in_force import in_force
from .named_adapters import NamedAdapters, only_a_part
from .packed import Params4bit
from .paths import named_modules
from .ragged import by_rows
from .shared_input import Operands, opened, shared_output

__all__ = ["Linear4bit", "LoRALinear4bit", "Params4bit", "only_a_part"]


PREFIX = "base_model.model."


def take_adapters(layer: Linear4bit) -> None:
    """Makes a plain :class:`Linear4bit` a :class:`LoRALinear4bit` without an adapter, in place."""
    if type(layer) is Linear4bit:
        layer.__class__ = LoRALinear4bit
        layer._init_adapters()


class LoRALinear4bit(NamedAdapters, Linear4bit):
    """``y = x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ + bias``: a :class:`Linear4bit` with named adapters.

    Adapter ``name`` is ``lora_A[name].weight [r, in_features]`` and ``lora_B[name].weight
    [out_features, r]``, PEFT's state-dict keys, with ``scaling[name] = lora_alpha / r``, or
    ``lora_alpha / sqrt(r)`` for rsLoRA. One adapter is active at a time; the parameters of the
    others require no gradient. Where this layer lacks the active adapter, and after
    :meth:`disable_adapters`, it is its base. Dropout acts in training mode only. Under
    :meth:`AdapterBank.using` each row has the adapter that the plan gives it instead.

    Sources: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), QLoRA (Dettmers et al. 2023).

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> layer = lk.LoRALinear4bit(64, 32, r=4)
        >>> layer.add_adapter("other", r=2)
        >>> layer.set_adapter("other")
        >>> layer.active_adapter, layer.r
        ('other', {'default': 4, 'other': 2})
        >>> layer(torch.randn(2, 64)).sum().backward()
        >>> [name for name, parameter in layer.named_parameters() if parameter.grad is not None and "lora" in name]
        ['lora_A.other.weight', 'lora_B.other.weight']
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = AdapterSettings.r,
        lora_alpha: float = AdapterSettings.lora_alpha,
        lora_dropout: float = AdapterSettings.lora_dropout,
        use_rslora: bool = AdapterSettings.use_rslora,
        init_lora_weights: bool | str = AdapterSettings.init_lora_weights,
        adapter_name: str = "default",
        adapter_dtype: torch.dtype | None = AdapterSettings.adapter_dtype,
        **base,
    ) -> None:
        """Adapter arguments as in :meth:`add_adapter`; ``base``: the keywords of Linear4bit."""
        settings = AdapterSettings(
            r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype
        )
        super().__init__(in_features, out_features, bias, **base)
        self._add_adapter(adapter_name, settings)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = AdapterSettings.r,
        lora_alpha: float = AdapterSettings.lora_alpha,
        lora_dropout: float = AdapterSettings.lora_dropout,
        use_rslora: bool = AdapterSettings.use_rslora,
        init_lora_weights: bool | str = AdapterSettings.init_lora_weights,
        adapter_name: str = "default",
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        adapter_dtype: torch.dtype | None = AdapterSettings.adapter_dtype,
    ) -> LoRALinear4bit:
        """``linear`` quantized as by :meth:`Linear4bit.from_linear`, with one active adapter.

        The other arguments, and what they raise: :meth:`add_adapter`.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> layer = lk.LoRALinear4bit.from_linear(torch.nn.Linear(64, 32), r=8, lora_alpha=16)
            >>> layer.scaling
            {'default': 2.0}
        """
        settings = AdapterSettings(
            r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype
        )
        self = super().from_linear(linear, quant_type, blocksize, double_quant, quant_storage)
        self._add_adapter(adapter_name, settings)
        return self

    # -- forward -----------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in_features] -> [..., out_features]`` in x's dtype: :func:`lora_linear_4bit`."""
        if getattr(x, "is_nested", False):
            return by_rows(self.forward, x)
        bias, name = self._parameters["bias"], self._active_adapter
        under = self.in_force(entries) if (entries := in_force.entries) else None
        if opened.scopes and (y := shared_output(self, x)) is not None:
            return y
        w = self.weight4bit
        if under is not None:
            if self._unmerged is not None:
                self._require_unmerged("forward under a plan")
            return multi(taken(x, w), w, *under, bias, self.training)
        if self._disabled and self._unmerged is not None:
            w = self._unmerged
        x = taken(x, w)
        if self._disabled or self._unmerged is not None or name not in self.r:
            return linear(x, w, bias)
        dropout_p = self.lora_dropout[name] if self.training else 0.0
        if not are_fused(*self.adapter_modules(name)):
            return self._by_calls(x, name, dropout_p)
        A, B = self.adapter_parameters(name)
        return lora(x, w, A, B, self.scaling[name], bias, dropout_p)

    def operands(self) -> Operands | None:
        """What the forward computes with, for layers that share their input; None where that is not one operator.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> layer = lk.LoRALinear4bit(64, 32, r=4, lora_alpha=8)
            >>> layer.operands().lora.scaling
            2.0
        """
        bias, name, w = self._parameters["bias"], self._active_adapter, self.weight4bit
        under = self.in_force(entries, note=False) if (entries := in_force.entries) else None
        if under is not None:
            return (
                None
                if self._unmerged is not None
                else Operands(w, bias, None, under, self.training)
            )
        if self._disabled and self._unmerged is not None:
            w = self._unmerged
        if self._disabled or self._unmerged is not None or name not in self.r:
            return Operands(w, bias)
        if not are_fused(*self.adapter_modules(name)):
            return None
        dropout_p = self.lora_dropout[name] if self.training else 0.0
        return Operands(
            w, bias, Lora(*self.adapter_parameters(name), self.scaling[name], dropout_p)
        )

    def _replicate_for_data_parallel(self):
        if any(id(self) in entry.pages for entry in in_force.entries):
            raise RuntimeError(
                "nn.DataParallel: expected no plan in force, since replicas have no pages; call the model itself"
            )
        return super()._replicate_for_data_parallel()

    def _by_calls(self, x: torch.Tensor, name: str, dropout_p: float) -> torch.Tensor:
        """The forward where A or B is more than its weight: what they are is called, as PEFT does."""
        A, B = self.adapter_modules(name)
        y = linear_4bit(x, self.weight4bit, self._parameters["bias"])
        own = next(A.parameters(), x).dtype
        return (y + B(A(F.dropout(x.to(own), dropout_p))) * self.scaling[name]).to(y.dtype)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear4bit]:
    """Every LoRALinear4bit by its path in the model, not in a wrapper of the model or of its parts."""
    return {
        path: module for path, module in named_modules(model) if isinstance(module, LoRALinear4bit)
    }
