"""How a call on a CPU is timed.

Rules, each against a way of fooling oneself:

- *Cold* cases rotate over enough copies of the weight that none is still in the last-level cache
  when its turn comes; a model never finds its next layer there. *Hot* cases reuse one copy.
- Every buffer is written before it is timed: untouched pages of ``torch.empty`` all read one zero
  page. Outputs get memory that was used before (:func:`keep_freed_memory`): fresh pages cost more
  than what is written to them, for every provider alike.
- Providers alternate within a case, several times over, so that a slow minute of the machine hits
  all of them.
- Medians and quartiles, never means or minima.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator

MAX_ROUNDS = 40  # per pass
SLOW_SECONDS = 0.2
SHORT_SECONDS = 0.05  # calls shorter than this are preceded by an untimed one in every pass


def warm_up(calls: Iterator[Callable]) -> float:
    """Seconds of an untimed call; the first also allocates and starts threads, so a short one is repeated."""
    seconds = float("inf")
    for _ in range(2):
        seconds = min(seconds, of(next(calls)))
        if seconds > SLOW_SECONDS:
            break
    return seconds


def of(call: Callable) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rounds(seconds: float, per_pass: float) -> int:
    """How many calls of so many seconds fit into a pass."""
    return min(MAX_ROUNDS, max(1, round(per_pass / seconds)))


def keep_freed_memory() -> bool:
    """Has glibc keep all that is freed, for this process and for good; False without glibc.

    By default it returns large blocks to the system, or not: that hangs on what was freed before.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):
        return False
    kept = {-4: 0, -1: (1 << 31) - 1}  # M_MMAP_MAX: no blocks of their own, M_TRIM_THRESHOLD
    return all([mallopt(option, value) == 1 for option, value in kept.items()])


def summary(seconds: list[float]) -> dict[str, float | int]:
    """Median and quartiles in milliseconds, and of how many rounds."""
    low, median, high = (
        statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    )
    return {
        "median_ms": median * 1e3,
        "q1_ms": low * 1e3,
        "q3_ms": high * 1e3,
        "rounds": len(seconds),
    }
