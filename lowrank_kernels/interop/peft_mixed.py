"""Batches with mixed adapters under PEFT: ``model(..., adapter_names=[...])`` in the multi-adapter kernel.

Each layer copies the adapters of the batch into pages of its own, where the kernel reads them. Which adapter
has which pages is the same in all layers with the same adapters, so they share one plan.
"""

from __future__ import annotations

import functools
import weakref
from typing import NamedTuple

import torch
from peft.tuners.lora import Linear as PeftLinear

from ..functional import linear_4bit
from ..multi_lora.functional import multi_lora_linear_4bit
from ..multi_lora.pages import ModulePages
from ..multi_lora.plan import PageTable, Plan
from ..schema import RANK_STEP, ceil_div


class Parts(NamedTuple):
    """An adapter that adds ``scaling · (dropout(x) Aᵀ Bᵀ + bias)`` and nothing else."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    dropout_p: float
    bias: torch.Tensor | None


class _Layout(PageTable):
    """Adapters one after another in the pages, each in as few as hold its rank. Never changes."""

    def __init__(self, ranks: tuple[tuple[str, int], ...], dtype, device) -> None:
        pages = sum(ceil_div(rank, RANK_STEP) for _, rank in ranks)
        super().__init__(pages, RANK_STEP, device)
        self.dtype = dtype
        self.first_page: dict[int, int] = {}
        for name, rank in ranks:
            slot, page_ids = self._take_pages(name, rank)
            self._name_slot(name, slot, rank)
            self.first_page[slot] = page_ids[0]


# One object for all layers with the same adapters. Small, and without references to a layer.
_layout = functools.lru_cache(maxsize=64)(_Layout)


@functools.lru_cache(maxsize=64)
def _plan(layout: _Layout, names: tuple[str | None, ...], tokens: int) -> Plan:
    with torch.inference_mode(False):
        return Plan(layout, names, [tokens] * len(names), fixed=False, max_rank=None)


class _Pages(ModulePages):
    """The adapters of one layer. Their parameters stay the owners of the values, see :meth:`refresh`."""

    def __init__(self, layer: PeftLinear) -> None:
        parts = {name: layer.plain_part(name) for name in layer.lora_A}
        parts = {name: part for name, part in parts.items() if part is not None}
        ranks = tuple((name, part.A.shape[0]) for name, part in parts.items())
        dtypes = {weight.dtype for part in parts.values() for weight in (part.A, part.B)}
        device = layer.get_base_layer().weight.device
        layout = _layout(ranks, dtypes.pop() if len(dtypes) == 1 else torch.float32, device)
        with torch.inference_mode(False):
            super().__init__(layout, "", weakref.proxy(layer))
        self.parts = parts
        self._scalings: dict[int, float] = {}
        self._views: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._copied: dict[int, tuple[tuple, tuple]] = {}  # A and B as they were then
        N, K = self.shape
        for name, part in parts.items():
            slot, rank = layout.slot(name), part.A.shape[0]
            first = layout.first_page[slot] * RANK_STEP
            rows = slice(first, first + rank)
            self._views[slot] = self.A.view(-1, K)[rows], self.B.view(-1, N)[rows].T
            self._scalings[slot] = float(part.scaling)
            self._describe(slot, rank, self._scalings[slot], part.dropout_p)
            self.follow(slot, name)

    def __reduce__(self):
        return type(None), ()  # a copy of the layer makes its own

    def hold(self, parts: dict[str, Parts], device: torch.device) -> bool:
        """Whether these are the adapters as they were, but for their values, and fit without loss.

        Others get other pages, so that a backward that is still to come finds what its forward had.
        """
        dtype = self.bank.dtype
        for name, (A, B, scaling, dropout_p, _) in parts.items():
            slot = self.bank._slots.get(name)
            if slot is None or self._ranks[slot] != A.shape[0]:
                return False
            if self._scalings[slot] != scaling or self._dropout[slot] != dropout_p:
                return False
            if dtype != torch.float32 and not A.dtype == B.dtype == dtype:
                return False
        return device == self.device

    def _own_adapter(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.parts[self.own[slot]][:2]

    @torch.no_grad()
    def refresh(self, plan: Plan) -> None:
        """Copies the adapters of the plan into their pages, but for those that are as they were copied.

        Those that require gradients are copied every time: not every optimizer's step can be seen. Of the
        others, writes through ``.data`` cannot, see :meth:`PeftLinear.forget_pages`.
        """
        pages, values = [], []
        for slot in plan.slots:
            A, B = self._own_adapter(slot)
            if not (slot in self._copied and all(map(_is_same, self._copied[slot], (A, B)))):
                pages += self._views[slot]
                values += A, B
                self._copied[slot] = _seen(A), _seen(B)
        if pages:
            torch._foreach_copy_(pages, values)


def _seen(parameter: torch.Tensor) -> tuple:
    # The alias keeps the memory from being freed, so that no other can have its address.
    unknown = parameter.requires_grad or parameter.is_inference()
    version = None if unknown else parameter._version
    return parameter, parameter.detach(), version


def _is_same(seen: tuple, parameter: torch.Tensor) -> bool:
    before, alias, version = seen
    return (
        before is parameter
        and not parameter.requires_grad
        and version is not None
        and parameter._version == version
        and parameter.data_ptr() == alias.data_ptr()
    )


@torch.compiler.disable
def mixed_batch(
    layer: PeftLinear, x: torch.Tensor, adapter_names: list[str], parts: dict[str, Parts]
) -> torch.Tensor:
    """:func:`multi_lora_linear_4bit` with an adapter for each ``x[i]``; ``parts``: those that the layer has.

    Differentiable in x, the bias and the parameters of the adapters.
    """
    base = layer.base_layer
    w, pages = base.weight4bit, layer._mixed_pages
    if not parts:
        return linear_4bit(x, w, base.bias)
    if pages is None or not pages.hold(parts, w.device):
        pages = layer._mixed_pages = _Pages(layer)
    names = tuple(name if name in parts else None for name in adapter_names)
    plan = _plan(pages.bank, names, x.shape[1:-1].numel())
    pages.parts = parts
    if not torch.is_grad_enabled():
        pages.refresh(plan)  # with gradients the function does it
    return multi_lora_linear_4bit(x, w, plan, pages, base.bias, dropout=True)
