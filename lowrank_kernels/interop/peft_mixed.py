"""Batches with mixed adapters under PEFT: ``model(..., adapter_names=[...])`` in the multi-adapter kernel.

The adapters of a layer live in pages of its own, those of one dtype together, where the kernel reads them: PEFT's
parameters are views of the pages. Which adapter has which pages is the same in all layers with the same adapters, so
they share one plan.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from ..arguments import RANK_STEP, ceil_div
from ..functional import linear_4bit
from ..multi_lora.functional import multi_lora_, multi_lora_linear_4bit
from ..multi_lora.pages import ModulePages
from ..multi_lora.plan import PageTable, Plan


class Parts(NamedTuple):
    """An adapter that adds ``scaling · (dropout(x) Aᵀ Bᵀ + bias)`` and nothing else."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    dropout_p: float
    bias: torch.Tensor | None


class _Layout(PageTable):
    """Adapters in the pages of a layer, each in as few as hold its rank. Never changes."""

    def __init__(self, ranks: tuple[tuple[str, int], ...], dtype, device) -> None:
        pages = sum(ceil_div(rank, RANK_STEP) for _, rank in ranks)
        super().__init__(pages, RANK_STEP, device)
        self.dtype = dtype
        self.first_page: dict[int, int] = {}
        for name, rank in ranks:
            slot, page_ids = self.take_pages(name, rank, adjacent=True)
            self.name_slot(name, slot, rank)
            self.first_page[slot] = page_ids[0]


# One object for all layers with the same adapters. Small, and without references to a layer.
_layout = functools.lru_cache(maxsize=64)(_Layout)


@functools.lru_cache(maxsize=64)
def _plan(layout: _Layout, names: tuple[str | None, ...], tokens: int) -> Plan:
    with torch.inference_mode(False):
        return Plan(layout, names, [tokens] * len(names), fixed=False, max_rank=None)


class _Adapters:
    """The owner of a layer's pages: the adapters of the layer that live there."""

    def __init__(self, layer: PeftLinear, parts: dict[str, Parts]) -> None:
        """``parts``: some of the layer's adapters, all of one dtype. They move in."""
        self.parts = parts
        ranks = tuple((name, part.A.shape[0]) for name, part in parts.items())
        A = next(iter(parts.values())).A
        with torch.inference_mode(False):
            self.layout = _layout(ranks, A.dtype, A.device)
            self.names = {self.layout.slot(name): name for name in parts}
            self.pages = ModulePages(self.layout, layer.out_features, layer.in_features, self)
            for slot, name in self.names.items():
                part = parts[name]
                self.pages.describe(slot, part.A.shape[0], float(part.scaling), part.dropout_p)
                self.pages.adopt(slot, self.layout.first_page[slot])

    def __reduce__(self):
        return type(None), ()  # a copy of the layer makes its own

    def adapter(self, slot: int) -> tuple[nn.Parameter, nn.Parameter]:
        part = self.parts[self.names[slot]]
        return part.A, part.B

    def release(self) -> None:
        """Gives the adapters memory of their own again."""
        for slot in self.names:
            self.pages.release(slot)

    def hold(self, parts: dict[str, Parts]) -> bool:
        """Whether these are the adapters as they were, but for their values, and fit.

        Others get other pages, so that a backward that is still to come finds what its forward had.
        """
        for name, part in parts.items():
            mine = self.parts.get(name)
            if mine is None or mine.A.shape != part.A.shape or mine.A.device != part.A.device:
                return False
            if (float(mine.scaling), mine.dropout_p) != (float(part.scaling), part.dropout_p):
                return False
        return True


def can_move(parts: dict[str, Parts], device: torch.device) -> bool:
    """Whether each of these adapters can live in pages: plain parameters of one dtype, where the base is."""
    return all(
        type(A) is type(B) is nn.Parameter and A.dtype == B.dtype and A.device == B.device == device
        for A, B, *_ in parts.values()
    )


def _of_dtype(layer: PeftLinear, parts: dict[str, Parts], dtype: torch.dtype) -> _Adapters:
    """The adapters of ``layer`` in this dtype, in pages; ``parts``: those that must be among them, as they are."""
    adapters = layer._mixed_adapters.get(dtype)
    if adapters is None or not adapters.hold(parts):
        if adapters is not None:
            adapters.release()
        for name in layer.lora_A:
            part = None if name in parts else layer.plain_part(name)
            if part is None or part.A.dtype != dtype:
                continue
            if can_move({name: part}, layer.base_layer.weight.device):
                parts = {**parts, name: part}
        adapters = layer._mixed_adapters[dtype] = _Adapters(layer, parts)
    adapters.parts = {**adapters.parts, **parts}
    return adapters


@torch.compiler.disable
def mixed_batch(
    layer: PeftLinear, x: torch.Tensor, adapter_names: list[str], parts: dict[str, Parts]
) -> torch.Tensor:
    """:func:`multi_lora_linear_4bit` with an adapter for each ``x[i]``; ``parts``: those that the layer has.

    Each of them :func:`can_move`. Those of a second dtype are added by :func:`multi_lora_`. Differentiable in x, the
    bias and the parameters of the adapters.
    """
    base = layer.base_layer
    w, y = base.weight4bit, None
    for dtype in dict.fromkeys(part.A.dtype for part in parts.values()):
        group = {name: part for name, part in parts.items() if part.A.dtype == dtype}
        adapters = _of_dtype(layer, group, dtype)
        names = tuple(name if name in group else None for name in adapter_names)
        plan = _plan(adapters.layout, names, x.shape[1:-1].numel())
        if y is None:
            y = multi_lora_linear_4bit(x, w, plan, adapters.pages, base.bias, dropout=True)
        else:
            y = multi_lora_(y, x, plan, adapters.pages, dropout=True)
    return linear_4bit(x, w, base.bias) if y is None else y
