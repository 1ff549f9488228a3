"""Has ``torch.utils.checkpoint`` recompute a function under the plans of its forward.

Checkpointing runs a function again in backward. By then another plan may be in force, or none, or another adapter be
active. The plans of the forward are put in force again. The other state of a layer is its model's to change, and with
it which parameters take gradients: where it is no longer that of the forward, RuntimeError.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import torch

from ..multi_lora.in_force import entered, in_force, only
from ..multi_lora.plan import Use
from .on_import import on_import


def register() -> None:
    on_import("torch.utils.checkpoint", _install)


def _install(checkpoint: ModuleType) -> None:
    """``checkpoint(...)`` looks up both kinds when it is called: it does not matter who imported it before."""
    generator = checkpoint._checkpoint_without_reentrant_generator
    if hasattr(generator, "of_lowrank_kernels"):
        return

    @functools.wraps(generator)
    def without_reentrant(function, *args, **kwargs):
        call = _Checkpointed(function)
        with entered(call):
            yield from generator(call.again, *args, **kwargs)

    without_reentrant.of_lowrank_kernels = True
    checkpoint._checkpoint_without_reentrant_generator = without_reentrant
    forward = checkpoint.CheckpointFunction.forward

    @functools.wraps(forward)
    def reentrant(ctx, function, *args):
        return forward(ctx, _Checkpointed(function), *args)

    checkpoint.CheckpointFunction.forward = staticmethod(reentrant)


class _Record:
    """What layers tell where a checkpointed function runs (see in_force.py)."""

    pages: ClassVar[dict] = {}
    plan, ended, records = None, False, True


class _Checkpointed(_Record):
    """One call of ``checkpoint``: the plans in force, and the states of each layer, in order."""

    def __init__(self, function: Callable) -> None:
        self.function = function
        self.plans = [(e.plan, e.plan.version) for e in in_force.entries if isinstance(e, Use)]
        self.states: dict[object, list[tuple]] = {}
        self.has_run = False

    def note(self, layer: object, state: tuple) -> None:
        if not torch.compiler.is_compiling():  # compiled code is not asked again either
            self.states.setdefault(layer, []).append(state)

    def __call__(self, *args: Any) -> Any:
        """The forward of the reentrant kind, and later its repetition."""
        if self.has_run:
            return self.again(*args)
        self.has_run = True
        with entered(self):
            return self.function(*args)

    def again(self, *args: Any, **kwargs: Any) -> Any:
        """The repetition in backward."""
        outer = tuple(entry for entry in in_force.entries if entry.records)
        with contextlib.ExitStack() as stack:
            stack.enter_context(only((*outer, _Repetition(self.states))))
            for plan, version in self.plans:
                if plan.version != version:
                    raise RuntimeError(
                        "plan: expected the backward before Plan.update, which has put another batch in its place"
                    )
                stack.enter_context(plan.in_use())
            return self.function(*args, **kwargs)


class _Repetition(_Record):
    """Compares the states of layers with those of the forward."""

    def __init__(self, states: dict[object, list[tuple]]) -> None:
        self.expected = {layer: iter(of_layer) for layer, of_layer in states.items()}

    def note(self, layer: object, state: tuple) -> None:
        before = next(self.expected.get(layer, iter(())), state)
        if before != state:
            raise RuntimeError(
                "torch.utils.checkpoint: expected a backward with the state of the forward (adapter, disabled, merged, "
                f"probability of dropout), {before}, got {state}; run backward before the active adapter, "
                "disable_adapters, merge or train() changes"
            )
