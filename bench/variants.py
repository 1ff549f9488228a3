"""This library against itself: 16-bit activations, fewer threads, other instruction sets, equal bits, no adapter.

They take turns with the default within a case, so that a few percent can be told from noise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch

import lowrank_kernels as lk
from lowrank_kernels.benchmark import check, providers
from lowrank_kernels.benchmark.case import Case
from lowrank_kernels.benchmark.providers import Calls, Unavailable

from .tables import OURS

Provider = Callable[[Case], Calls]
SIXTEEN_BITS = ("bfloat16", "float16")
SCALAR_TOKENS = 16  # no plain C++ beyond: a call would take seconds


def named(words: str) -> str:
    return f"{OURS}, {words}"


def thread_name(count: int) -> str:
    return named(f"{count} thread{'s' * (count > 1)}")


BASE = named("base alone")
INVARIANT = named("batch-invariant")


def _within(context: Callable, provider: Provider) -> Provider:
    """The calls of ``provider``, each in a context of its own: a microsecond or two."""

    def run(call):
        with context():
            return call()

    return lambda case: [functools.partial(run, call) for call in provider(case)]


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def _replaced(provider: Provider, **changes: object) -> Provider:
    """``provider`` on the same case but for ``changes``."""
    return lambda case: provider(dataclasses.replace(case, **changes))


def counts_below(threads: int) -> list[int]:
    """1, 2, 4, ..., all of them below ``threads``."""
    return [1 << bit for bit in range(threads.bit_length()) if 1 << bit < threads]


def of_linear(case: Case, provider: Provider) -> dict[str, Provider]:
    """Variants of ``provider`` for cold float32 cases of a CPU; none for others."""
    if (case.device, case.dtype, case.cache) != ("cpu", "float32", "cold"):
        return {}
    found = {named(dtype): _replaced(provider, dtype=dtype) for dtype in SIXTEEN_BITS}
    for count in counts_below(torch.get_num_threads()):
        found[thread_name(count)] = _within(functools.partial(_threads, count), provider)
    found[INVARIANT] = _within(lk.batch_invariant, provider)
    for isa in lk.backends.isas():
        if isa != lk.backends.isa() and (isa != "scalar" or case.M <= SCALAR_TOKENS):
            found[named(isa)] = _within(functools.partial(lk.backends.use_isa, isa), provider)
    return found


def of_lora(case: Case) -> dict[str, Provider]:
    """The base without its adapter, for cold float32 cases of the forward."""
    if (case.op, case.dtype, case.cache) != ("lora_linear_4bit", "float32", "cold"):
        return {}
    return {BASE: _replaced(providers.linear_lowrank, op="linear_4bit", R=0)}


def linear_int8_unchecked(case: Case) -> Calls:
    """linear_4bit under ``int8_activations()``. Raises Unavailable where there is none."""
    if not hasattr(lk, "int8_activations"):
        raise Unavailable("this version has no int8_activations()")
    return _within(lk.int8_activations, providers.linear_lowrank)(case)


def linear_int8(case: Case) -> Calls:
    """The same, once checked. Raises Unavailable where it cannot run; Wrong for a wrong result."""
    calls = linear_int8_unchecked(case)
    try:
        check.verify(case, [calls[0]()])
    except RuntimeError as error:  # a CPU without VNNI
        raise Unavailable(str(error)) from None
    return calls
