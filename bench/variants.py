"""This library against itself: 16-bit activations, fewer threads, other instruction sets, equal bits, no adapter, int8.

They take turns with the default within a case, so that a few percent can be told from noise.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

import lowrank_kernels as lk
from lowrank_kernels.benchmark.case import Case
from lowrank_kernels.benchmark.harness import Provider
from lowrank_kernels.benchmark.ops import OURS
from lowrank_kernels.benchmark.providers import Calls, Unavailable, linear_lowrank

SIXTEEN_BITS = ("bfloat16", "float16")
SCALAR_TOKENS = 16  # no plain C++ beyond: a call would take seconds


def named(words: str) -> str:
    return f"{OURS}, {words}"


BASE, INVARIANT, INT8 = named("base alone"), named("batch-invariant"), named("int8 activations")


def is_variant(name: str) -> bool:
    """Whether this is the library in another way than by itself, exact as ever."""
    return name.startswith(f"{OURS}, ") and name != INT8


def thread_name(count: int) -> str:
    return named(f"{count} thread{'s' * (count > 1)}")


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def counts_below(threads: int) -> list[int]:
    """1, 2, 4, ..., all of them below ``threads``."""
    return [1 << bit for bit in range(threads.bit_length()) if 1 << bit < threads]


def of_linear(case: Case, calls: Callable[[Case], Calls]) -> dict[str, Provider]:
    """Variants of ``calls`` for cold float32 cases of a CPU; none for others."""
    if (case.device, case.dtype, case.cache) != ("cpu", "float32", "cold"):
        return {}
    found = {named(dtype): Provider(calls, changes={"dtype": dtype}) for dtype in SIXTEEN_BITS}
    for count in counts_below(torch.get_num_threads()):
        found[thread_name(count)] = Provider(calls, functools.partial(_threads, count))
    found[INVARIANT] = Provider(calls, lk.batch_invariant)
    for isa in lk.backends.isas():
        if isa != lk.backends.isa() and (isa != "scalar" or case.M <= SCALAR_TOKENS):
            found[named(isa)] = Provider(calls, functools.partial(lk.backends.use_isa, isa))
    return found


def of_lora(case: Case) -> dict[str, Provider]:
    """The base without its adapter, for cold float32 cases of the forward on a CPU."""
    wanted = ("cpu", "lora_linear_4bit", "float32", "cold")
    if (case.device, case.op, case.dtype, case.cache) != wanted:
        return {}
    return {BASE: Provider(linear_lowrank, changes={"op": "linear_4bit", "R": 0})}


def linear_int8(case: Case) -> Calls:
    if not lk.backends.report()["int8"]:
        raise Unavailable("this CPU has neither AVX512-VNNI nor AVX-VNNI")
    return linear_lowrank(case)


def triton(calls: Callable[[Case], Calls]) -> Provider:
    """``calls`` on the Triton kernels; the CUDA kernels stay where they are."""
    return Provider(calls, functools.partial(lk.backends.use, "triton"))


int8 = Provider(linear_int8, lk.int8_activations)
