"""``NamedAdapters``: what every layer with named LoRA adapters over a frozen 4-bit weight has."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from .adapter import AdapterSettings, check_adapter_name, is_bare, lora_scaling, train_only
from .frozen4bit import Frozen4bit, is_dtensor
from .multi_lora.pages import ModulePages, save_plainly
from .multi_lora.plan import Plan
from .paths import named_modules


def only_a_part() -> RuntimeError:
    return RuntimeError(
        "save_adapter: this process has only a part of the adapter; call "
        "lowrank_kernels.distributed.save_adapter on all processes"
    )


class NamedAdapters(Frozen4bit):
    """Named adapters: their parameters, which of them is active, and merging. What they compute is a layer's own.

    Adapter ``name`` is ``lora_A[name].weight [r, in_features]`` and ``lora_B[name].weight [out_features, r]``, PEFT's
    state-dict keys; of a stack of ``num_experts`` weights ``[r E, in_features]`` and ``[out_features, r E]``.
    """

    num_experts = 1

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
        A = nn.Linear(self.in_features, r * self.num_experts, bias=False, **factory)
        B = nn.Linear(r * self.num_experts, self.out_features, bias=False, **factory)
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
            self._merge_weight(lambda W: self._with_adapter(W, name))
        else:
            self._unmerged = self.weight4bit

    def _with_adapter(self, W: torch.Tensor, name: str) -> torch.Tensor:
        """W + scaling · B A, written to W, which is float32."""
        A, B = self.adapter_parameters(name)
        return W.addmm_(B.float(), A.float(), alpha=self.scaling[name])

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

    # -- many adapters in one batch ----------------------------------------------------------------

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

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, active_adapter={self._active_adapter!r}"


def adapted_layers(model: nn.Module) -> dict[str, NamedAdapters]:
    """Every layer that can have adapters by its path in the model, not in a wrapper of the model or of its parts."""
    return {
        path: module for path, module in named_modules(model) if isinstance(module, NamedAdapters)
    }
