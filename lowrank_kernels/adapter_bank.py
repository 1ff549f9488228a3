"""``AdapterBank``: a pool of rank pages for every ``LoRALinear4bit`` of a model.

A page holds ``page_rank`` ranks of an adapter in every module: page p of a module is ``A[p] [page_rank, K]`` and
``B[p] [page_rank, N]`` (B transposed). An adapter takes as many pages as its largest rank needs, any free
ones, so ranks mix without padding and nothing fragments. Page ids are the same in all modules.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from .adapter import AdapterLayer, check_fused, layer_of, train_only
from .adapter_format import read_adapter, read_state_dict
from .arguments import FLOAT_DTYPES, RANK_STEP
from .experts import GroupedLinear4bit
from .multi_lora.experts import StackPages
from .multi_lora.pages import ModulePages, home_of
from .multi_lora.plan import PageTable, Plan
from .named_adapters import NamedAdapters, adapted_layers
from .nn import lora_layers
from .targets import check_all_match, is_end, read_parameters


class _Layer:
    """A layer as the owner of pages: those of its adapters that were loaded without a source."""

    def __init__(self, name: str, layer: NamedAdapters) -> None:
        self.name, self.layer = name, layer
        self.own: dict[int, tuple[str, int]] = {}  # slot -> the adapter and its rank

    def adapter(self, slot: int) -> tuple[nn.Parameter, nn.Parameter]:
        name, rank = self.own[slot]
        if self.layer.r.get(name) != rank:
            raise RuntimeError(
                f"{self.name}: expected its adapter {name!r} with r = {rank} as it was when the bank loaded it, got "
                f"r = {self.layer.r.get(name)}; evict it and load it again"
            )
        modules = self.layer._modules
        A, B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        return A._parameters["weight"], B._parameters["weight"]


class AdapterBank(PageTable):
    """Adapters of one model, of any ranks, that serve or train together in one batch.

    ::

        bank = AdapterBank.for_model(model, num_pages=64)
        bank.load("french", "adapters/french")
        plan = bank.plan(["french", None], tokens_per_sequence=[512, 37])
        with bank.using(plan):
            model(...)

    ``bank[module_name]`` are the pages of one module, for :func:`multi_lora_`. ``bank.heads[name]`` are the parameters
    of heads that the file of adapter ``name`` held, such as ``{"score.weight": [1, D]}`` of a reward model, as they
    were read: a plan mixes adapters, and whoever makes it applies their heads to the rows. Memory:
    ``num_pages * page_rank * Σ (K + N)`` elements over the modules, see :attr:`nbytes`.

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> report = lk.replace_linear(model, r=4, progress=False)
        >>> bank = lk.AdapterBank.for_model(model, num_pages=8)
        >>> french = {"0.lora_A.weight": torch.randn(8, 64), "0.lora_B.weight": torch.randn(32, 8)}
        >>> bank.load("french", french, lora_alpha=16)
        >>> bank.adapters, bank.free_pages, bank.module_names
        (('french',), 7, ('0',))
        >>> with torch.no_grad(), bank.using(bank.plan(["french", None], [3, 2])):
        ...     y = model(torch.randn(5, 64))  # rows 0 to 2 have the adapter, rows 3 and 4 the base alone
    """

    def __init__(
        self,
        layers: Mapping[str, NamedAdapters],
        num_pages: int,
        page_rank: int = 8,
        dtype: torch.dtype | None = None,
    ) -> None:
        """``layers``: by the names that adapter files call them; the rest as in :meth:`for_model`."""
        if type(num_pages) is not int or not 1 <= num_pages < 2**24:
            raise ValueError(f"num_pages: expected an integer >= 1, got {num_pages!r}")
        if type(page_rank) is not int or page_rank < 1 or page_rank % RANK_STEP:
            raise ValueError(f"page_rank: expected a multiple of {RANK_STEP}, got {page_rank!r}")
        if dtype is not None and dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
        devices = {layer.weight.device for layer in layers.values()}
        if len(devices) != 1 or next(iter(devices)).type == "meta":
            raise ValueError(
                f"model: expected all LoRALinear4bit on one device with data, got {devices or 'none'}"
            )
        super().__init__(num_pages, page_rank, devices.pop())
        self.dtype = dtype or _common_dtype(layers.values())
        self.heads: dict[str, dict[str, torch.Tensor]] = {}
        self._layers = {name: _Layer(name, layer) for name, layer in layers.items()}
        self._modules = {name: self._pages_of(name, layer) for name, layer in layers.items()}
        self.pages_of_layer = {id(layer): self._modules[name] for name, layer in layers.items()}

    def _pages_of(self, name: str, layer: NamedAdapters) -> ModulePages:
        N, K = layer.out_features, layer.in_features
        if isinstance(layer, GroupedLinear4bit):
            return StackPages(self, layer.num_experts, N, K, self._layers[name])
        return ModulePages(self, N, K, self._layers[name], _is_routed(name))

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        num_pages: int,
        page_rank: int = 8,
        dtype: torch.dtype | None = None,
        target_parameters: str | Iterable[str] | None = None,
    ) -> AdapterBank:
        """A bank for every :class:`LoRALinear4bit` of ``model``, on the model's device.

        Args:
            num_pages: pages in each module; an adapter of rank r takes ``ceil(r / page_rank)`` of them.
            page_rank: ranks of a page, a multiple of 8. What an adapter leaves of its last page is memory,
                not work: kernels stop at its rank.
            dtype: of the pages; adapters from files and state dicts are rounded to it as they are loaded, the
                model's own must have it. By default that of the layers' adapters if they have one in common, else
                float32.
            target_parameters: stacks of experts that adapters may cover too, see :func:`add_adapter`. Each of their
                pages is as many as there are experts.

        Raises ValueError or TypeError naming the argument, also for a model without such layers.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
            >>> report = lk.replace_linear(model, r=4, progress=False)
            >>> bank = lk.AdapterBank.for_model(model, num_pages=8)
            >>> bank.nbytes  # pages of 8 ranks for 64 inputs and 32 outputs, in float32
            24576
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        layers: dict[str, NamedAdapters] = dict(lora_layers(model))
        stacks = {
            path: layer
            for path, layer in adapted_layers(model).items()
            if isinstance(layer, GroupedLinear4bit)
        }
        names = read_parameters(target_parameters)
        check_all_match("target_parameters", names, stacks, "stack of experts", stacks)
        layers |= {p: l for p, l in stacks.items() if any(is_end(p, name) for name in names)}
        return cls(layers, num_pages, page_rank, dtype)

    # -- what is there -----------------------------------------------------------------------------

    def __getitem__(self, module_name: str) -> ModulePages:
        if module_name not in self._modules:
            some = ", ".join(list(self._modules)[:3])
            raise KeyError(
                f"module_name: expected one of this bank's {len(self._modules)} modules ({some}, ...), "
                f"got {module_name!r}"
            )
        return self._modules[module_name]

    @property
    def module_names(self) -> tuple[str, ...]:
        return tuple(self._modules)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages of all modules."""
        return sum(t.nbytes for pages in self._modules.values() for t in (pages.A, pages.B))

    def __repr__(self) -> str:
        return (
            f"AdapterBank({len(self._modules)} modules, {len(self._slots)} adapters, "
            f"{self.free_pages} of {self.num_pages} pages of {self.page_rank} ranks free, {self.dtype}, "
            f"{self.nbytes / 2**20:.1f} MiB on {self.device})"
        )

    # -- loading and evicting ----------------------------------------------------------------------

    def load(
        self,
        name: str,
        source: str | os.PathLike | Mapping[str, torch.Tensor] | None = None,
        *,
        lora_alpha: float | None = None,
        use_rslora: bool = False,
    ) -> None:
        """Loads an adapter under ``name``. All of it is checked before anything changes.

        Args:
            source: a folder in PEFT's format (see :func:`load_adapter`); or a state dict with PEFT's keys,
                ``[base_model.model.]<module>.lora_A.weight [r, K]`` and ``.lora_B.weight [N, r]``; or None:
                the model's own adapter ``name``. Its parameters then live in the pages: they are the same objects,
                for an optimizer too, but views of the pages, B a transposed one, until it is evicted. Of stacks of
                experts the pages have copies, which :meth:`using` and changes of the parameters make anew. Under a
                plan gradients reach those that require some. State dicts, copies and pickles of the model have plain
                tensors. It needs pages side by side.
            lora_alpha, use_rslora: for a state dict, which does not say; scaling is ``lora_alpha / r``, or
                ``/ sqrt(r)`` for rsLoRA, and 1 where ``lora_alpha`` is None.

        Raises ValueError, naming the key, for what :func:`load_adapter` refuses, and for a name that is loaded
        already; RuntimeError if too few pages are free, and for an adapter of the model's own that has another dtype
        than the pages or lives in another bank.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
            >>> report = lk.replace_linear(model, r=4, progress=False)
            >>> bank = lk.AdapterBank.for_model(model, num_pages=8)
            >>> bank.load("default")  # the model's own adapter
            >>> bank.load("other", {"0.lora_A.weight": torch.randn(2, 64), "0.lora_B.weight": torch.randn(32, 2)})
            >>> bank.adapters
            ('default', 'other')
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: expected a non-empty string, got {name!r}")
        if name in self._slots:
            raise ValueError(
                f"name: expected a new one, got {name!r}, which is loaded; evict it first"
            )
        layers = {module: owner.layer for module, owner in self._layers.items()}
        heads: dict[str, torch.Tensor] = {}
        if source is None:
            adapters = self._own_adapter(name)
        elif isinstance(source, Mapping):
            adapters, heads = read_state_dict(layers, source, lora_alpha, use_rslora)
        else:
            adapters, heads = read_adapter(layers, source)
        max_rank = max(adapter.r for adapter in adapters.values())
        slot, page_ids = self.take_pages(name, max_rank, adjacent=source is None)
        try:
            for module, pages in self._modules.items():
                adapter = adapters.get(module)
                if adapter is None:
                    pages.describe(slot, 0, 0.0, 0.0)
                    continue
                pages.describe(slot, adapter.r, adapter.scaling, adapter.lora_dropout)
                if source is None:
                    self._layers[module].own[slot] = name, adapter.r
                    pages.adopt(slot, page_ids[0])
                else:
                    pages.fill(page_ids, adapter.A, adapter.B)
        except BaseException:
            self._release(slot)
            raise
        self.name_slot(name, slot, max_rank)
        self.heads[name] = heads

    def _own_adapter(self, name: str) -> dict[str, AdapterLayer]:
        """The model's own adapter ``name`` by module. Raises unless it can live in this bank."""
        layers = {module: owner.layer for module, owner in self._layers.items()}
        adapters = {m: layer_of(layer, name) for m, layer in layers.items() if name in layer.r}
        if not adapters:
            known = sorted({adapter for layer in layers.values() for adapter in layer.r})
            raise ValueError(
                f"name: expected one of the model's own adapters, {known}, where there is no "
                f"source, got {name!r}"
            )
        for module, adapter in adapters.items():
            for parameter in (adapter.A, adapter.B):
                if parameter.dtype != self.dtype:
                    raise RuntimeError(
                        f"name: expected the model's own adapter {name!r} in {self.dtype} like the pages, got "
                        f"{parameter.dtype} in {module}; make a bank with that dtype, or load a copy from a state dict"
                    )
                if home_of(parameter) is not None:
                    raise RuntimeError(
                        f"name: the model's own adapter {name!r} lives in another AdapterBank; evict it there "
                        "first, or load a copy from a state dict"
                    )
        return adapters

    def evict(self, name: str) -> None:
        """Frees the pages of ``name``. Plans with it hold no longer.

        Raises ValueError if it is not loaded, RuntimeError while a plan with it is in use.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
            >>> report = lk.replace_linear(model, r=4, progress=False)
            >>> bank = lk.AdapterBank.for_model(model, num_pages=8)
            >>> bank.load("default")
            >>> bank.evict("default")
            >>> bank.free_pages
            8
        """
        slot = self.slot(name)
        try:
            self._release(slot)
        except RuntimeError:
            raise RuntimeError(
                f"name: {name!r} is in a plan in use; leave its `with bank.using(plan)` first"
            ) from None
        del self._slots[name], self._max_rank[slot], self.heads[name]

    def _release(self, slot: int) -> None:
        self.pool.evict(slot)
        self.evictions += 1
        for owner, pages in zip(self._layers.values(), self._modules.values()):
            pages.release(slot)
            owner.own.pop(slot, None)

    def trainable(self, *names: str) -> list[nn.Parameter]:
        """Sets requires_grad on exactly these adapters of the model's own; returns their parameters.

        Raises ValueError for a name that is not loaded or was not loaded from the model itself.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
            >>> report = lk.replace_linear(model, r=4, progress=False)
            >>> bank = lk.AdapterBank.for_model(model, num_pages=8)
            >>> bank.load("default")
            >>> [tuple(parameter.shape) for parameter in bank.trainable("default")]
            [(4, 64), (32, 4)]
        """
        slots = [self.slot(name) for name in names]
        for name, slot in zip(names, slots):
            if not any(slot in pages.own for pages in self._modules.values()):
                raise ValueError(
                    f"names: expected the model's own adapters (loaded without a source), got {name!r}"
                )
        layers = [owner.layer for owner in self._layers.values()]
        for owner in self._layers.values():
            train_only(owner.layer, [name for name in names if self._slots[name] in owner.own])
        return [
            parameter
            for layer in layers
            for name in names
            if name in layer.r
            for parameter in layer.adapter_parameters(name)
        ]

    # -- plans -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def using(self, plan: Plan) -> Iterator[Plan]:
        """Within the block every layer of the model works under ``plan``; backward belongs inside too.

        Each row then has the adapter that the plan gives it, whichever adapter is active. Layers of other models,
        and those made after the bank, work as they do without a plan; plans of several banks may be in force at
        once, and of one bank the innermost counts. The block holds for its context: a thread that is started within
        it sees no plan, and an asyncio task that is started within it sees this one. Blocks may overlap in any order.
        The plan's adapters cannot be evicted meanwhile.

        Raises TypeError or ValueError for what is no plan of this bank, RuntimeError if an adapter of the plan has
        been evicted, or if parameters that live in the pages were replaced by some that do not fit.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
            >>> report = lk.replace_linear(model, r=4, progress=False)
            >>> bank = lk.AdapterBank.for_model(model, num_pages=8)
            >>> bank.load("default")
            >>> optimizer = torch.optim.SGD(bank.trainable("default"), lr=0.1)
            >>> with bank.using(bank.plan(["default", None])):
            ...     model(torch.randn(2, 64)).square().mean().backward()
            >>> optimizer.step()
        """
        if not isinstance(plan, Plan):
            raise TypeError(f"plan: expected a Plan of AdapterBank.plan, got {type(plan).__name__}")
        if plan.bank is not self:
            raise ValueError("plan: expected one of this bank, got one of another AdapterBank")
        with plan.in_use():
            for owner, pages in zip(self._layers.values(), self._modules.values(), strict=True):
                for slot in owner.own.keys() & set(plan.slots):
                    check_fused(owner.layer, owner.own[slot][0])
                pages.refresh(plan)
            yield plan


def _is_routed(name: str) -> bool:
    """Whether this is a layer of routed experts, by the name that models give to the list of them."""
    return "experts" in name.split(".")


def _common_dtype(layers: Iterable[NamedAdapters]) -> torch.dtype:
    dtypes = {part.weight.dtype for layer in layers for part in layer.lora_A.values()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32
