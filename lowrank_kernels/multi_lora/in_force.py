"""What is in force where a layer runs: plans of banks, and the records of checkpointed functions.

It belongs to a context of :mod:`contextvars`: every thread has its own, which is empty when the thread starts, and
every asyncio task begins with a copy of the one that made it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any, Protocol


class Entry(Protocol):
    """A plan, or the record of a checkpointed function (checkpoints.py)."""

    pages: Mapping[
        int, Any
    ]  # of a plan: the ModulePages of each layer that is under it, by the layer's id
    plan: Any
    ended: bool  # the block is over: what is in force was copied from a context where it was not
    records: bool  # of a record: it has a method ``note(layer, state)``, called in the forward of every layer


_entries: contextvars.ContextVar[tuple[Entry, ...]] = contextvars.ContextVar("lowrank_kernels")


class _InForce(tuple):
    # A property, since torch.compile knows nothing of context variables but guards on the value of a property
    # whose getter is written in C. Where the variable was never set, this getter returns its argument: this very
    # object, which is an empty tuple.
    entries = property(_entries.get)


in_force = _InForce()


@contextlib.contextmanager
def entered(entry: Entry) -> Iterator[None]:
    """Within the block ``entry`` is in force, after all others. Blocks may overlap in any order."""
    _entries.set((*in_force.entries, entry))
    try:
        yield
    finally:
        _entries.set(tuple(other for other in in_force.entries if other is not entry))


@contextlib.contextmanager
def only(entries: tuple[Entry, ...]) -> Iterator[None]:
    """Within the block nothing but these is in force."""
    before = in_force.entries
    _entries.set(entries)
    try:
        yield
    finally:
        _entries.set(before)
