"""What a machine can do at most: bytes moved and matrix products, on a CPU also with AVX2 alone, and on a GPU.

AVX2's product is torch's own in a process that is told to use nothing better: the limit that kernels
forced to AVX2 are held against. That process runs this file. Of all limits the best round counts.
"""

from __future__ import annotations

import functools
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

import torch

READ_BYTES = 1 << 30
SGEMM_SIZE = 2048
COPY_BYTES = 2 << 30  # on a GPU
MATMUL_SIZE = 8192
ROUNDS = 8
TURNS = 4  # moments of a run at which limits are measured
AVX2_ONLY = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def _read() -> Callable:
    """Reads READ_BYTES with all threads: more than any cache holds, and written beforehand."""
    return torch.ones(READ_BYTES // 4).sum


def _product(size: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Callable:
    """On random data: the same product of zeros is faster, since it needs less power."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.zeros_like(a)
    return lambda: torch.mm(a, b, out=out)


def _copy() -> Callable:
    source = torch.ones(COPY_BYTES // 4, device="cuda")
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


LIMITS = {
    "cpu": {"read": _read, "sgemm": lambda: _product(SGEMM_SIZE)},
    "cuda": {
        "copy": _copy,
        "write": lambda: functools.partial(torch.zeros(COPY_BYTES // 4, device="cuda").fill_, 1.0),
        "matmul": lambda: _product(MATMUL_SIZE, "cuda", torch.bfloat16),
    },
}


def best_seconds(call: Callable, device: str = "cpu") -> float:
    """Of ROUNDS rounds after two untimed ones."""
    if device == "cuda":
        from lowrank_kernels.benchmark.timing import Device

        return min(Device().times(call, 2 + ROUNDS)[2:])
    seconds = []
    for _ in range(2 + ROUNDS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])


def sgemm_avx2_seconds() -> float:
    """The best round in a process that uses AVX2 and as many threads."""
    command = [sys.executable, "-m", "bench.limits", str(torch.get_num_threads())]
    root = pathlib.Path(__file__).parent.parent
    done = subprocess.run(
        command, cwd=root, env=os.environ | AVX2_ONLY, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def measure(device: str, best: dict[str, float], with_avx2: bool) -> None:
    """One turn: lowers what ``best`` has of each limit, in seconds."""
    calls = {
        name: lambda m=make: best_seconds(m(), device) for name, make in LIMITS[device].items()
    }
    if with_avx2:
        calls["sgemm_avx2"] = sgemm_avx2_seconds
    for name, seconds in calls.items():
        best[name] = min(seconds(), best.get(name, float("inf")))


def limits_of(best: dict[str, float]) -> dict[str, float]:
    """GB/s (of a copy: bytes read and bytes written), GFLOP/s, and of a GPU TFLOP/s, from the best round of each."""
    work = {
        "read": ("read_gbs", READ_BYTES / 1e9),
        "sgemm": ("sgemm_gflops", 2 * SGEMM_SIZE**3 / 1e9),
        "sgemm_avx2": ("sgemm_avx2_gflops", 2 * SGEMM_SIZE**3 / 1e9),
        "copy": ("copy_gbs", 2 * COPY_BYTES / 1e9),
        "write": ("write_gbs", COPY_BYTES / 1e9),
        "matmul": ("matmul_tflops", 2 * MATMUL_SIZE**3 / 1e12),
    }
    return {work[name][0]: work[name][1] / seconds for name, seconds in best.items()}


def rates(limits: dict[str, float]) -> tuple[float, float]:
    """(GB/s, GFLOP/s) that a case is held against."""
    if "copy_gbs" in limits:
        return limits["copy_gbs"], limits["matmul_tflops"] * 1e3
    return limits["read_gbs"], limits["sgemm_gflops"]


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(best_seconds(LIMITS["cpu"]["sgemm"]()))
