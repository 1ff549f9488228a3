"""The emulator's library as the tests use it beside the operators: its C interface, the order of threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator

ORDERS = {"forward": (0, 0), "reverse": (1, 0), "shuffled": (2, 1), "shuffled again": (2, 2)}


def library() -> ctypes.CDLL:
    """The one that the operators use: LOWRANK_EMULATOR."""
    return ctypes.CDLL(os.environ["LOWRANK_EMULATOR"])


# The functions of struct CudaTable in csrc/cuda/api.h, in their order.
TABLE = (
    "quantize", "double_quantize_workspace", "double_quantize", "dequantize",
    "plan_linear", "linear", "plan_linear_backward", "linear_backward",
    "plan_multi", "multi", "plan_multi_backward", "multi_backward",
    "grouped", "grouped_backward", "failure",
)  # fmt: skip


class Table(ctypes.Structure):
    _fields_ = [("size", ctypes.c_int64), *((name, ctypes.c_void_p) for name in TABLE)]


class Weight4(ctypes.Structure):
    """lk::Weight4 of csrc/common/params.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("packed", "absmax", "absmax_u8")),
        *((name, ctypes.c_void_p) for name in ("nested_absmax", "nested_code", "nested_offset")),
        ("code", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in "NK"),
        ("block_shift", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("first_block", "first")),
    ]


def launcher(name: str, result: type, *arguments: type) -> Callable:
    """A function of the table, which takes references as pointers."""
    get = library().lk_cuda_kernels
    get.restype = ctypes.POINTER(Table)
    table = get().contents
    assert table.size == ctypes.sizeof(Table), "TABLE is not that of csrc/cuda/api.h"
    return ctypes.CFUNCTYPE(result, *arguments)(getattr(table, name))


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
