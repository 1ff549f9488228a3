"""What a CPU can do at most: bytes read from memory, float32 products, also with AVX2 alone.

AVX2's product is torch's own in a process that is told to use nothing better: the limit that kernels
forced to AVX2 are held against. That process runs this file, which therefore imports torch alone.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

import torch

READ_BYTES = 1 << 30
SGEMM_SIZE = 2048
LIMIT_ROUNDS = 8
AVX2_ONLY = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def read_call() -> Callable:
    """Reads READ_BYTES with all threads: more than any cache holds, and written beforehand."""
    buffer = torch.ones(READ_BYTES // 4)
    return buffer.sum


def sgemm_call() -> Callable:
    """A float32 matrix product that is limited by arithmetic alone."""
    a, b = torch.randn(2, SGEMM_SIZE, SGEMM_SIZE)
    out = torch.zeros(SGEMM_SIZE, SGEMM_SIZE)
    return lambda: torch.mm(a, b, out=out)


LIMITS = {"read": read_call, "sgemm": sgemm_call}
AVX2 = "sgemm_avx2"  # see sgemm_avx2_seconds


def sgemm_avx2_seconds() -> float:
    """The best round of :func:`sgemm_call` in a process that uses AVX2 and as many threads."""
    command = [sys.executable, "-m", "bench.limits", str(torch.get_num_threads())]
    root = pathlib.Path(__file__).parent.parent
    done = subprocess.run(
        command, cwd=root, env=os.environ | AVX2_ONLY, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def limits_of(best_seconds: dict[str, float]) -> dict[str, float]:
    """GB/s and GFLOP/s from the best round of each limit; AVX2's where it was measured."""
    found = {"read_gbs": READ_BYTES / best_seconds["read"] / 1e9}
    for name in ("sgemm", AVX2):
        if name in best_seconds:
            found[f"{name}_gflops"] = 2 * SGEMM_SIZE**3 / best_seconds[name] / 1e9
    return found


def rates(limits: dict[str, float]) -> tuple[float, float]:
    """(GB/s, GFLOP/s) that a case is held against."""
    if "copy_gbs" in limits:
        return limits["copy_gbs"], limits["matmul_tflops"] * 1e3
    return limits["read_gbs"], limits["sgemm_gflops"]


def _best_seconds(call: Callable) -> float:
    best = float("inf")
    for turn in range(2 + LIMIT_ROUNDS):
        start = time.perf_counter()
        call()
        if turn >= 2:
            best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(_best_seconds(sgemm_call()))
