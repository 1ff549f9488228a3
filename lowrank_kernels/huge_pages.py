"""Packed weights on huge pages of memory.

A decode step reads a whole model once, page by page. Pages of 4 KiB are hundreds of thousands, each of which the CPU
has to look up, in a virtual machine twice; pages of 2 MiB spare that. It is advice to the system: where it is not
followed, nothing else changes. docs/performance.md says what it brought.
"""

from __future__ import annotations

import ctypes
import functools
import sys

import torch

_SIZE = 2 << 20
_HUGEPAGE, _COLLAPSE = 14, 25  # madvise(2): from the next touch on; and now (Linux 6.1 and later)


@functools.cache
def _madvise():
    if sys.platform != "linux":
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return madvise


def advise(tensor: torch.Tensor) -> None:
    """Asks for huge pages under the memory of ``tensor``, if it is on the CPU and has room for one of them."""
    size = tensor.numel() * tensor.element_size()
    if size < 2 * _SIZE or tensor.device.type != "cpu" or (madvise := _madvise()) is None:
        return
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # a fake tensor, or a shard's wrapper
        return
    first, end = -(-start // _SIZE) * _SIZE, (start + size) // _SIZE * _SIZE
    for advice in (_HUGEPAGE, _COLLAPSE):
        madvise(first, end - first, advice)
