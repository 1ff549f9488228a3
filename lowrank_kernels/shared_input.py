"""Layers that read the same x in a forward of their parent: the first that is called computes the outputs of all of
them in one operator, and each of the others takes its own.

Nothing is kept beyond a forward of the parent: :func:`share` gives it two hooks, of which the first opens a scope, in
this thread, and the other closes it, after an error too. Within it an output is taken only by the layer it was
computed for, once, for the very tensor x that it was computed from, unchanged, under the same gradient and autocast
modes, and if all that decides about it (weight, bias, adapter, plan, dropout) is still what it was. Otherwise the layer
computes as it always does.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import nn

from .adapter import is_bare
from .formats import Weight4bit
from .functional import taken
from .groups import Lora, group
from .multi_lora.groups import multi_group
from .multi_lora.pages import ModulePages
from .multi_lora.plan import Plan


class Operands(NamedTuple):
    """All that decides about y = layer(x), beside x."""

    w: Weight4bit
    bias: torch.Tensor | None
    lora: Lora | None = None
    under: tuple[Plan, ModulePages] | None = None  # the plan in force, which comes before ``lora``
    dropout: bool = False  # whether the adapters of the plan drop elements of x

    def are(self, others: Operands) -> bool:
        """Whether both hold the same tensors, the same plan and equal numbers."""
        mine, theirs = self.lora, others.lora
        if (mine is None) != (theirs is None) or (self.under is None) != (others.under is None):
            return False
        pairs = [(self.w, others.w), (self.bias, others.bias)]
        if mine is not None:
            if mine[2:] != theirs[2:]:
                return False
            pairs += zip(mine[:2], theirs[:2])
        if self.under is not None:
            pairs += zip(self.under, others.under)
        return self.dropout == others.dropout and all(a is b for a, b in pairs)


class Member(Protocol):
    """A layer that can share its input."""

    def operands(self) -> Operands | None:
        """What its forward would compute with; None if that is more than one operator."""


class _Scope:
    """One forward of a parent."""

    def __init__(self, parent: nn.Module, members: Sequence[nn.Module]):
        self.parent = parent
        self.members = {id(member): member for member in members}
        self.x: torch.Tensor | None = None
        self.mode: tuple = ()
        self.outputs: dict[int, tuple[Operands, torch.Tensor]] = {}

    def output(self, member: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        if id(member) not in self.members or not isinstance(x, torch.Tensor):
            return None
        first = self.x is None
        if first:
            self.x, self.mode = x, _mode(x)
            self.outputs = self._compute(member, x)
        elif x is not self.x or self.mode != _mode(x):
            return None
        found = self.outputs.pop(id(member), None)
        if found is None:
            return None
        if not first:
            now = member.operands()
            if now is None or not now.are(found[0]):
                return None
        return found[1]

    def _compute(self, member: nn.Module, x: torch.Tensor) -> dict:
        """The outputs of ``member`` and all others that can be computed with it; none if there are no others."""
        own = member.operands()
        if own is None or x.layout is not torch.strided or getattr(x, "is_nested", False):
            return {}
        # A tensor of inference mode does not tell whether it was changed: hooks could have done that.
        if x.is_inference() and not all(map(is_bare, self.members.values())):
            return {}
        found = {}
        for key, other in self.members.items():
            operands = own if other is member else other.operands()
            if operands is not None and _go_together(own, operands):
                found[key] = operands
        if len(found) < 2:
            return {}
        x = taken(x, own.w)
        ws = [operands.w for operands in found.values()]
        biases = [operands.bias for operands in found.values()]
        if own.under is None:
            ys = group(x, ws, biases, [operands.lora for operands in found.values()])
        else:
            pages = [operands.under[1] for operands in found.values()]
            dropout = [operands.dropout for operands in found.values()]
            ys = multi_group(x, ws, own.under[0], pages, biases, dropout)
        return {key: (operands, y) for (key, operands), y in zip(found.items(), ys)}


def _go_together(one: Operands, other: Operands) -> bool:
    plan, another = (of.under and of.under[0] for of in (one, other))
    same_input = one.w.shape[1] == other.w.shape[1] and one.w.device == other.w.device
    return same_input and plan is another


def _mode(x: torch.Tensor) -> tuple:
    """What has to be the same for the outputs to be."""
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    version = None if x.is_inference() else x._version
    return version, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast


class _Open(threading.local):
    scopes: tuple[_Scope, ...] = ()


opened = _Open()


def shared_output(member: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """y of ``member`` if the innermost scope of this thread has it, or can compute it with those of others."""
    return opened.scopes[-1].output(member, x)


def _enter(parent: nn.Module, args: tuple) -> None:
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
    ):
        return
    members = [getattr(parent, name, None) for name in parent._shared_input]
    members = [member for member in members if hasattr(type(member), "operands")]
    opened.scopes = (*opened.scopes, _Scope(parent, members))


def _leave(parent: nn.Module, args: tuple, output: object) -> None:
    if opened.scopes and opened.scopes[-1].parent is parent:
        opened.scopes = opened.scopes[:-1]


def share(parent: nn.Module, names: Sequence[str]) -> None:
    """From now on the children ``names`` of ``parent``, as far as they are 4-bit layers, share their input."""
    if not hasattr(parent, "_shared_input"):
        parent.register_forward_pre_hook(_enter, prepend=True)
        parent.register_forward_hook(_leave, always_call=True)
    parent._shared_input = tuple(names)


# -- which layers ----------------------------------------------------------------------------------

_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
# Classes of transformers whose forward calls these children with one tensor.
KNOWN: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention",
            "GemmaAttention", "Gemma2Attention", "Gemma3Attention", "PhiAttention",
        ),
        _ATTENTION,
    ),
    **dict.fromkeys(
        ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "GemmaMLP", "Gemma2MLP", "Gemma3MLP"),
        _MLP,
    ),
}  # fmt: skip
JOINED = ("Phi3Attention", "Phi3MLP")  # have one layer for what others have several


def share_known(model: nn.Module, is_member) -> tuple[list[tuple[str, tuple[str, ...]]], str]:
    """Lets the layers of known classes share their input: (path and names of each group, why there is none)."""
    groups, joined = [], False
    for path, module in model.named_modules():
        kind = type(module).__name__
        joined = joined or kind in JOINED
        names = KNOWN.get(kind, ())
        names = tuple(name for name in names if is_member(getattr(module, name, None)))
        if len(names) > 1:
            share(module, names)
            groups.append((path, names))
    if groups:
        return groups, ""
    if joined:
        return groups, "its projections are joined in one layer already"
    return groups, f"none of its modules is one of {', '.join(KNOWN)} with two 4-bit layers or more"
