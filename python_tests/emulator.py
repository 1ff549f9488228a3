"""The emulator's library as the tests use it beside the operators: its C interface, the order of threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

ORDERS = {"forward": (0, 0), "reverse": (1, 0), "shuffled": (2, 1), "shuffled again": (2, 2)}


def library() -> ctypes.CDLL:
    """The one that the operators use: LOWRANK_EMULATOR."""
    return ctypes.CDLL(os.environ["LOWRANK_EMULATOR"])


@contextlib.contextmanager
def thread_order(kind: int, seed: int = 0) -> Iterator[None]:
    """Within the block, threads run forward (0), in reverse (1) or shuffled by the seed (2)."""
    set_order = library().lk_emulator_set_order
    set_order.argtypes = [ctypes.c_int, ctypes.c_uint64]
    set_order(kind, seed)
    try:
        yield
    finally:
        set_order(0, 0)
