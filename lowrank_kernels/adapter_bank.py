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

from .adapter import check_fused, layer_of, train_only
from .adapter_format import read_adapter, read_state_dict
from .multi_lora.pages import ModulePages
from .multi_lora.plan import PageTable, Plan, active, set_active
from .nn import LoRALinear4bit, lora_layers
from .schema import FLOAT_DTYPES, RANK_STEP


class AdapterBank(PageTable):
    """Adapters of one model, of any ranks, that serve or train together in one batch.

    ::

        bank = AdapterBank.for_model(model, num_pages=64)
        bank.load("french", "adapters/french")
        plan = bank.plan(["french", None], tokens_per_sequence=[512, 37])
        with bank.using(plan):
            model(...)

    ``bank[module_name]`` are the pages of one module, for :func:`multi_lora_`. Memory: ``num_pages * page_rank
    * Σ (K + N)`` elements over the modules, see :attr:`nbytes`.
    """

    def __init__(
        self,
        layers: Mapping[str, LoRALinear4bit],
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
        self._modules = {name: ModulePages(self, name, layer) for name, layer in layers.items()}
        self._by_layer = {id(pages.layer): pages for pages in self._modules.values()}

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        num_pages: int,
        page_rank: int = 8,
        dtype: torch.dtype | None = None,
    ) -> AdapterBank:
        """A bank for every :class:`LoRALinear4bit` of ``model``, on the model's device.

        Args:
            num_pages: pages in each module; an adapter of rank r takes ``ceil(r / page_rank)`` of them.
            page_rank: ranks of a page, a multiple of 8. What an adapter leaves of its last page is memory,
                not work: kernels stop at its rank.
            dtype: of the pages; adapters are rounded to it as they are loaded. By default that of the layers'
                adapters if they have one in common, else float32.

        Raises ValueError or TypeError naming the argument, also for a model without such layers.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        return cls(lora_layers(model), num_pages, page_rank, dtype)

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

    def pages_of(self, layer: LoRALinear4bit) -> ModulePages:
        """The pages of a layer. Raises ValueError for a layer of another model."""
        pages = self._by_layer.get(id(layer))
        if pages is None:
            raise ValueError(
                "plan: expected one of a bank of this model; this layer is not among the "
                f"{len(self._modules)} modules of the bank whose plan is in use (a layer that was made "
                "later needs a new bank)"
            )
        return pages

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
                the model's own adapter ``name``, whose parameters stay the owners of its values. The pages
                follow them, and under a plan gradients reach those that require some.
            lora_alpha, use_rslora: for a state dict, which does not say; scaling is ``lora_alpha / r``, or
                ``/ sqrt(r)`` for rsLoRA, and 1 where ``lora_alpha`` is None.

        Raises ValueError, naming the key, for what :func:`load_adapter` refuses, and for a name that is loaded
        already; RuntimeError if too few pages are free.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: expected a non-empty string, got {name!r}")
        if name in self._slots:
            raise ValueError(
                f"name: expected a new one, got {name!r}, which is loaded; evict it first"
            )
        layers = {module: pages.layer for module, pages in self._modules.items()}
        if source is None:
            adapters = {m: layer_of(layer, name) for m, layer in layers.items() if name in layer.r}
            if not adapters:
                known = sorted({adapter for layer in layers.values() for adapter in layer.r})
                raise ValueError(
                    f"name: expected one of the model's own adapters, {known}, where there is no "
                    f"source, got {name!r}"
                )
        elif isinstance(source, Mapping):
            adapters = read_state_dict(layers, source, lora_alpha, use_rslora)
        else:
            adapters = read_adapter(layers, source)
        max_rank = max(adapter.r for adapter in adapters.values())
        slot, page_ids = self._take_pages(name, max_rank)
        try:
            for module, pages in self._modules.items():
                pages.assign(slot, page_ids, adapters.get(module))
                if source is None and module in adapters:
                    pages.follow(slot, name)
        except BaseException:
            self._release(slot)
            raise
        self._name_slot(name, slot, max_rank)

    def evict(self, name: str) -> None:
        """Frees the pages of ``name``. Plans with it hold no longer.

        Raises ValueError if it is not loaded, RuntimeError while a plan with it is in use.
        """
        slot = self.slot(name)
        try:
            self._release(slot)
        except RuntimeError:
            raise RuntimeError(
                f"name: {name!r} is in a plan in use; leave its `with bank.using(plan)` first"
            ) from None
        del self._slots[name], self._max_rank[slot]

    def _release(self, slot: int) -> None:
        self.pool.evict(slot)
        self.evictions += 1
        for pages in self._modules.values():
            pages.forget(slot)

    def trainable(self, *names: str) -> list[nn.Parameter]:
        """Makes just these adapters of the model's own require gradients; their parameters, for an optimizer.

        Raises ValueError for a name that is not loaded or was not loaded from the model itself.
        """
        slots = [self.slot(name) for name in names]
        for name, slot in zip(names, slots):
            if not any(slot in pages.own for pages in self._modules.values()):
                raise ValueError(
                    f"names: expected the model's own adapters (loaded without a source), got {name!r}"
                )
        for pages in self._modules.values():
            train_only(pages.layer, [name for name in names if self._slots[name] in pages.own])
        return [
            parameter
            for pages in self._modules.values()
            for name in names
            if name in pages.layer.r
            for parameter in pages.layer.adapter_parameters(name)
        ]

    # -- plans -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def using(self, plan: Plan) -> Iterator[Plan]:
        """Within the block every layer of the model works under ``plan``; backward belongs inside too.

        Each row then has the adapter that the plan gives it, whichever adapter is active. In the whole process,
        not per thread. Its adapters cannot be evicted meanwhile. The values of the model's own adapters are
        taken over at the start, and again at every forward that records gradients.
        Raises TypeError or ValueError for what is no plan of this bank, RuntimeError if an adapter of the plan
        has been evicted.
        """
        if not isinstance(plan, Plan):
            raise TypeError(f"plan: expected a Plan of AdapterBank.plan, got {type(plan).__name__}")
        if plan.bank is not self:
            raise ValueError("plan: expected one of this bank, got one of another AdapterBank")
        plan.check_current()
        self.pool.pin(plan.slots, plan.generations)
        previous = active()
        try:
            for pages in self._modules.values():
                for slot in pages.own.keys() & set(plan.slots):
                    check_fused(pages.layer, pages.own[slot])
                pages.refresh(plan)
            set_active(plan)
            yield plan
        finally:
            set_active(previous)
            self.pool.unpin(plan.slots)


def _common_dtype(layers: Iterable[LoRALinear4bit]) -> torch.dtype:
    dtypes = {part.weight.dtype for layer in layers for part in layer.lora_A.values()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32
