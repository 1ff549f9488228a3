"""``ModulePages``: the adapters of one module, in pages of ranks, as the kernels read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from ..adapter import AdapterLayer
from ..schema import ceil_div
from .plan import PageTable, Plan


class Layer(Protocol):
    """The layer whose own adapters the pages follow."""

    out_features: int
    in_features: int
    r: Mapping[str, int]

    def adapter_parameters(self, name: str) -> tuple[nn.Parameter, nn.Parameter]: ...


class ModulePages:
    """The pages of one module, ``bank[module_name]``: what :func:`multi_lora_` reads."""

    def __init__(self, bank: PageTable, name: str, layer: Layer) -> None:
        self.bank, self.name, self.layer = bank, name, layer
        self.shape = (layer.out_features, layer.in_features)
        num_pages, page_rank = bank.num_pages, bank.page_rank
        options = {"dtype": bank.dtype, "device": bank.device}
        # Not initialised: no kernel reads past an adapter's rank.
        self.A = torch.empty(num_pages, page_rank, layer.in_features, **options)
        self.B = torch.empty(num_pages, page_rank, layer.out_features, **options)
        self.device = self.A.device
        self._ranks = [0] * num_pages
        self._dropout = [0.0] * num_pages
        self._tables = (
            torch.zeros(num_pages, dtype=torch.int32, device=bank.device),
            torch.zeros(num_pages, dtype=torch.float32, device=bank.device),
            torch.zeros(num_pages, dtype=torch.float64, device=bank.device),
        )
        self.own: dict[int, str] = {}  # slot -> adapter of the layer that it follows
        # slot -> its pages: torch.compile cannot ask the pool.
        self._pages: dict[int, list[int]] = {}
        self._grad_rows: dict[tuple[int, ...], torch.Tensor] = {}

    def op_args(self) -> tuple[torch.Tensor, ...]:
        """The arguments PAGES of the operators but for the seed (see schema.py)."""
        return self.A, self.B, *self._tables

    def rank(self, slot: int) -> int:
        return self._ranks[slot]

    def dropout(self, plan: Plan) -> float:
        """The largest dropout probability of the plan's adapters: 0.0 if none has any."""
        return max([0.0, *[self._dropout[slot] for slot in plan.slots]])

    # -- what the pages hold -----------------------------------------------------------------------

    def assign(self, slot: int, pages: list[int], adapter: AdapterLayer | None) -> None:
        """Fills the pages of ``slot``; None: the adapter does not cover this module."""
        if adapter is None:
            self._describe(slot, 0, 0.0, 0.0)
        else:
            self._describe(slot, adapter.r, adapter.scaling, adapter.lora_dropout)
        self._grad_rows.clear()
        self._pages[slot] = pages
        if adapter is not None:
            self._write(pages, adapter.A, adapter.B)

    def _describe(self, slot: int, rank: int, scaling: float, dropout_p: float) -> None:
        self._ranks[slot], self._dropout[slot] = rank, dropout_p
        for table, value in zip(self._tables, (rank, scaling, dropout_p)):
            table[slot] = value

    @torch.no_grad()
    def _write(self, pages: list[int], A: torch.Tensor, B: torch.Tensor) -> None:
        rank, page_rank = A.shape[0], self.bank.page_rank
        for i in range(ceil_div(rank, page_rank)):
            rows = slice(i * page_rank, min(rank, (i + 1) * page_rank))
            count = rows.stop - rows.start
            self.A[pages[i], :count].copy_(A[rows])
            self.B[pages[i], :count].copy_(B[:, rows].T)

    # -- the model's own adapters ------------------------------------------------------------------

    def follow(self, slot: int, name: str) -> None:
        """The pages of ``slot`` follow adapter ``name`` of the layer from now on."""
        self.own[slot] = name

    def forget(self, slot: int) -> None:
        self.own.pop(slot, None)

    def _own_adapter(self, slot: int) -> tuple[nn.Parameter, nn.Parameter]:
        name, layer = self.own[slot], self.layer
        if layer.r.get(name) != self._ranks[slot]:
            raise RuntimeError(
                f"{self.name}: expected its adapter {name!r} with r = {self._ranks[slot]} as it was "
                f"when the bank loaded it, got r = {layer.r.get(name)}; evict it and load it again"
            )
        return layer.adapter_parameters(name)

    def refresh(self, plan: Plan) -> None:
        """Brings the values of the model's own adapters into their pages."""
        for slot in plan.slots:
            if slot in self.own:
                self._write(self._pages[slot], *self._own_adapter(slot))

    def parameters(self, plan: Plan) -> tuple[list[int], list[nn.Parameter]]:
        """Slots of the plan's adapters that want gradients, and A and B of each; their pages are refreshed."""
        slots: list[int] = []
        parameters: list[nn.Parameter] = []
        if not self.own or not torch.is_grad_enabled():
            return slots, parameters
        self.refresh(plan)  # an optimizer may have made a step
        for slot in plan.slots:
            if slot in self.own:
                A, B = self._own_adapter(slot)
                if A.requires_grad or B.requires_grad:
                    slots.append(slot)
                    parameters += (A, B)
        return slots, parameters

    def grad_layout(self, slots: tuple[int, ...]) -> tuple[dict[int, int], int]:
        """The first row of each slot's gradients among those of all ``slots``, and the number of rows."""
        first, rows = {}, 0
        for slot in slots:
            first[slot] = rows
            rows += self._ranks[slot]
        return first, rows

    def grad_rows(self, slots: tuple[int, ...]) -> torch.Tensor:
        """:meth:`grad_layout` as the operators take it."""
        if slots in self._grad_rows:
            return self._grad_rows[slots]
        rows = [-1] * len(self._ranks)
        for slot, first in self.grad_layout(slots)[0].items():
            rows[slot] = first
        made = torch.tensor(rows, dtype=torch.int32, device=self.device)
        if not torch.compiler.is_compiling():  # which may write to nothing in a backward
            self._grad_rows[slots] = made
        return made

    def __repr__(self) -> str:
        N, K = self.shape
        return f"ModulePages({self.name!r}, N={N}, K={K}, {self.bank.num_pages} pages)"
