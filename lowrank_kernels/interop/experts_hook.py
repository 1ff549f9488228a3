"""Registers experts in 4 bits with transformers' interface for implementations of experts."""

from __future__ import annotations

from types import ModuleType

from ..experts import Experts4bit, experts_forward
from .on_import import on_import

NAME = "lowrank_kernels"


def register() -> None:
    on_import("transformers.integrations.moe", _install)


def _install(moe: ModuleType) -> None:
    def forward(self, hidden_states, top_k_index, top_k_weights):
        """In 4 bits, or where a module stayed dense as "grouped_mm"."""
        if isinstance(self, Experts4bit):
            return experts_forward(self, hidden_states, top_k_index, top_k_weights)
        return moe.grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)

    moe.ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
