"""``LoRALinear4bit``: a 4-bit linear layer with named LoRA adapters, on top of ``Linear4bit``."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from .adapter import (
    AdapterSettings,
    are_fused,
    check_adapter_name,
    is_bare,
    lora_scaling,
    train_only,
)
from .functional import linear, linear_4bit, lora, taken
from .groups import Lora
from .linear4bit import Linear4bit, Params4bit, is_dtensor
from .multi_lora.functional import multi
from .multi_lora.in_force import in_force
from .multi_lora.pages import ModulePages, save_plainly
from .multi_lora.plan import Plan
from .paths import named_modules
from .ragged import by_rows
from .shared_input import Operands, opened, shared_output

__all__ = ["Linear4bit", "LoRALinear4bit", "Params4bit"]


PREFIX = "base_model.model."


def only_a_part() -> RuntimeError:
    return RuntimeError(
        "save_adapter: this process has only a part of the adapter; call "
        "lowrank_kernels.distributed.save_adapter on all processes"
    )


class LoRALinear4bit(Linear4bit):
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

    def _setup(self, w, bias):
        self._init_adapters()
        super()._setup(w, bias)

    def _init_adapters(self) -> None:
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.scaling: dict[str, float] = {}
        self._active_adapter: str | None = None
        self._disabled: list[object] = []  # one for each call of disable_adapters that is in force
        self.register_state_dict_post_hook(save_plainly)

    # -- adapters ----------------------------------------------------------------------------------

    def add_adapter(
        self,
        name: str,
        r: int = AdapterSettings.r,
        lora_alpha: float = AdapterSettings.lora_alpha,
        lora_dropout: float = AdapterSettings.lora_dropout,
        use_rslora: bool = AdapterSettings.use_rslora,
        init_lora_weights: bool | str = AdapterSettings.init_lora_weights,
        adapter_dtype: torch.dtype | None = AdapterSettings.adapter_dtype,
    ) -> None:
        """Adds adapter ``name``; it becomes active if none is, otherwise by :meth:`set_adapter`.

        ``init_lora_weights``: True draws A Kaiming-uniform (a = sqrt 5), "gaussian" with standard
        deviation 1/r, and both set B = 0; False leaves both as nn.Linear draws them.
        ``adapter_dtype`` is float32 unless given, also over a 16-bit base.
        Raises ValueError or TypeError naming the argument, also for a name that exists.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> layer = lk.LoRALinear4bit(64, 32, r=4)
            >>> layer.add_adapter("wide", r=16, lora_alpha=32, use_rslora=True)
            >>> layer.scaling["wide"]
            8.0
        """
        settings = AdapterSettings(
            r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype
        )
        self._add_adapter(name, settings)

    def _add_adapter(self, name: str, settings: AdapterSettings) -> None:
        check_adapter_name(name)
        if name in self.r:
            raise ValueError(f"name: expected a new adapter, got {name!r}, one of {list(self.r)}")
        r, dtype = settings.r, settings.adapter_dtype or torch.float32
        factory = {"device": self.weight.device, "dtype": dtype}
        A = nn.Linear(self.in_features, r, bias=False, **factory)
        B = nn.Linear(r, self.out_features, bias=False, **factory)
        if settings.init_lora_weights == "gaussian":
            nn.init.normal_(A.weight, std=1 / r)
        if settings.init_lora_weights:
            nn.init.zeros_(B.weight)
        self.lora_A[name] = A.train(self.training).requires_grad_(False)
        self.lora_B[name] = B.train(self.training).requires_grad_(False)
        self.r[name], self.lora_alpha[name] = r, settings.lora_alpha
        self.lora_dropout[name] = float(settings.lora_dropout)
        self.use_rslora[name] = settings.use_rslora
        self.scaling[name] = lora_scaling(r, settings.lora_alpha, settings.use_rslora)
        if self._active_adapter is None and not self.merged:
            self.set_adapter(name)

    def delete_adapter(self, name: str) -> None:
        """Removes adapter ``name``; if it was active, none is then.

        Raises ValueError for an unknown name, RuntimeError if it is merged.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> layer = lk.LoRALinear4bit(64, 32, r=4)
            >>> layer.delete_adapter("default")
            >>> layer.r, layer.active_adapter
            ({}, None)
        """
        if name not in self.r:
            raise ValueError(f"name: expected one of {list(self.r)}, got {name!r}")
        if name == self._active_adapter:
            self._require_unmerged("delete_adapter")
            self._active_adapter = None
        for field in (self.lora_A, self.lora_B, self.r, self.lora_alpha, self.lora_dropout):
            del field[name]
        del self.use_rslora[name], self.scaling[name]

    def set_adapter(self, name: str) -> None:
        """Makes ``name`` the active adapter: of all adapters only its parameters require gradients.

        A name this layer lacks is allowed, since an adapter may cover only some layers of a model:
        the layer is then its base. Raises RuntimeError while an adapter is merged.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> layer = lk.LoRALinear4bit(64, 32, r=4)
            >>> layer.add_adapter("other", r=2)
            >>> layer.set_adapter("other")
            >>> [parameter.requires_grad for parameter in layer.adapter_parameters("default")]
            [False, False]
        """
        if not isinstance(name, str):
            raise TypeError(f"name: expected a string, got {type(name).__name__}")
        self._require_unmerged("set_adapter")
        self._active_adapter = name
        train_only(self, (name,))

    def adapter_parameters(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A ``[r, in_features]`` and B ``[out_features, r]`` of adapter ``name``.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> layer = lk.LoRALinear4bit(64, 32, r=4)
            >>> [tuple(parameter.shape) for parameter in layer.adapter_parameters("default")]
            [(4, 64), (32, 4)]
        """
        A, B = self.adapter_modules(name)
        try:
            return A._parameters["weight"], B._parameters["weight"]
        except (
            KeyError
        ):  # a replica of nn.DataParallel has attributes, a parametrized layer computes
            return A.weight, B.weight

    def adapter_modules(self, name: str) -> tuple[nn.Module, nn.Module]:
        """The modules that hold A and B of adapter ``name``.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> layer = lk.LoRALinear4bit(64, 32, r=4)
            >>> layer.adapter_modules("default")
            (Linear(in_features=64, out_features=4, bias=False), Linear(in_features=4, out_features=32, bias=False))
        """
        # Past Module.__getattr__, which takes 20 times as long and is asked at every decode step.
        modules = self._modules
        return modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]

    def whole_adapter(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B as they are saved. Raises RuntimeError where this process has only parts of them.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> layer = lk.LoRALinear4bit(64, 32, r=4)
            >>> A, B = layer.whole_adapter("default")
        """
        A, B = self.adapter_parameters(name)
        if is_dtensor(A):
            raise only_a_part()
        return A, B

    def shard_of_adapter(
        self, A: torch.Tensor, B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What this layer holds of a whole A and B: all, unless it is a parallel layer.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> layer = lk.LoRALinear4bit(64, 32, r=4)
            >>> A, B = layer.shard_of_adapter(torch.zeros(4, 64), torch.zeros(32, 4))
        """
        return A, B

    @property
    def active_adapter(self) -> str | None:
        return self._active_adapter

    def disable_adapters(self) -> contextlib.AbstractContextManager:
        """The layer is its base from now on, even while merged; in a ``with``, until its end.

        Blocks may overlap in any order: the layer is its base until the last of them has ended.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> layer = lk.LoRALinear4bit(64, 32, r=4)
            >>> x = torch.randn(2, 64)
            >>> with layer.disable_adapters():
            ...     torch.equal(layer(x), lk.linear_4bit(x, layer.weight4bit, layer.bias))
            True
        """
        request = object()
        self._disabled.append(request)
        restore = contextlib.ExitStack()
        restore.callback(self._no_longer_disabled, request)
        return restore

    def _no_longer_disabled(self, request: object) -> None:
        if request in self._disabled:
            self._disabled.remove(request)

    def enable_adapters(self) -> None:
        """Undoes every :meth:`disable_adapters`.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> layer = lk.LoRALinear4bit(64, 32, r=4)
            >>> undo = layer.disable_adapters()
            >>> layer.enable_adapters()
        """
        self._disabled.clear()

    # -- merging -----------------------------------------------------------------------------------

    def _require_unmerged(self, action: str) -> None:
        if self.merged:
            name = self._active_adapter
            raise RuntimeError(f"{action}: adapter {name!r} is merged; call unmerge() first")

    @torch.no_grad()
    def merge(self) -> None:
        """Quantizes ``W + scaling · B A`` with the same settings and runs on that; keeps W aside.

        Quantizing again costs accuracy: the merged layer is near, not equal to, the unmerged one.
        Needs a float32 ``[N, K]`` temporary. Where this layer lacks the active adapter the weight
        stays as it is. The state dict of a merged layer holds the merged weight.
        Raises RuntimeError if merged already, or if adapters are disabled or none is active.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> layer = lk.LoRALinear4bit(64, 32, r=4)
            >>> layer.merge()
            >>> layer.merged
            True
        """
        self._require_unmerged("merge")
        if self._active_adapter is None or self._disabled:
            state = "adapters are disabled" if self._disabled else "no adapter is active"
            raise RuntimeError(f"merge: {state} on this layer, which has {list(self.r)}")
        if (name := self._active_adapter) in self.r:
            if not all(map(is_bare, self.adapter_modules(name))):
                raise RuntimeError(
                    f"merge: lora_A or lora_B of adapter {name!r} has hooks (offloading, weight norm, pruning, or "
                    "your own), which a merged weight cannot have; remove them first"
                )
            A, B = self.adapter_parameters(name)
            self._merge_weight(lambda W: W.addmm_(B.float(), A.float(), alpha=self.scaling[name]))
        else:
            self._unmerged = self.weight4bit

    def unmerge(self) -> None:
        """Restores the original bytes exactly. Raises RuntimeError if nothing is merged.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> layer = lk.LoRALinear4bit(64, 32, r=4)
            >>> before = layer.weight4bit.packed.clone()
            >>> layer.merge()
            >>> layer.unmerge()
            >>> torch.equal(layer.weight4bit.packed, before)
            True
        """
        if not self.merged:
            raise RuntimeError("unmerge: nothing is merged; call merge() first")
        self._unmerge_weight()

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

    def in_force(self, entries: tuple, note: bool = True) -> tuple[Plan, ModulePages] | None:
        """The plan of a bank of this layer that is in force, and the layer's pages, if it is not disabled.

        ``entries``: all that is in force. Records of checkpoints hear what else decides about y, with ``note``.
        Raises RuntimeError if the block of the plan has ended, ValueError for a layer of routed experts.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> layer = lk.LoRALinear4bit(64, 32, r=4)
            >>> layer.in_force(()) is None  # no plan is in force anywhere
            True
        """
        found = None
        for entry in reversed(entries):
            if not self._disabled and (pages := entry.pages.get(id(self))) is not None:
                if entry.ended:
                    raise RuntimeError(
                        "forward under a plan: this asyncio task began in a block `with bank.using(plan)` that has "
                        "ended since; enter a block in the task itself"
                    )
                if pages.routed:
                    pages.check_order(entry.plan)
                found = entry.plan, pages
                break
        for entry in entries:
            if entry.records and note:
                entry.note(self, self._state(planned=found is not None))
        return found

    def _state(self, planned: bool) -> tuple[str | None, bool, bool, float]:
        """What decides about y, beside the tensors and a plan: adapter, disabled, merged, probability of dropout."""
        disabled, name = bool(self._disabled), self._active_adapter
        if disabled or planned or name not in self.r:
            name = None
        dropout_p = self.lora_dropout[name] if name is not None and self.training else 0.0
        return name, disabled, self.merged, float(self.training) if planned else dropout_p

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

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, active_adapter={self._active_adapter!r}"


def lora_layers(model: nn.Module) -> dict[str, LoRALinear4bit]:
    """Every LoRALinear4bit by its path in the model, not in a wrapper of the model or of its parts."""
    return {
        path: module for path, module in named_modules(model) if isinstance(module, LoRALinear4bit)
    }
