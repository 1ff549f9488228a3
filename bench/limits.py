"""What a machine can do at most: bytes moved and matrix products. Of all rounds the best one counts."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

READ_BYTES = 1 << 30
SGEMM_SIZE = 2048
COPY_BYTES = 2 << 30  # on a GPU
MATMUL_SIZE = 8192
ROUNDS, SECONDS = 8, 2.0
TURNS = 4  # moments of a run at which limits are measured


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


# Name in the results -> what a call moves (of a copy: bytes read and bytes written) or computes, in units of the name.
LIMITS = {
    "cpu": {
        "read_gbs": (READ_BYTES / 1e9, _read),
        "sgemm_gflops": (2 * SGEMM_SIZE**3 / 1e9, lambda: _product(SGEMM_SIZE)),
        "bf16_gflops": (
            2 * SGEMM_SIZE**3 / 1e9,
            lambda: _product(SGEMM_SIZE, dtype=torch.bfloat16),
        ),
    },
    "cuda": {
        "copy_gbs": (2 * COPY_BYTES / 1e9, _copy),
        "matmul_tflops": (
            2 * MATMUL_SIZE**3 / 1e12,
            lambda: _product(MATMUL_SIZE, "cuda", torch.bfloat16),
        ),
    },
}


def best_seconds(call: Callable, device: str = "cpu") -> float:
    """Of ROUNDS rounds after two untimed ones; of fewer where they take more than SECONDS."""
    if device == "cuda":
        from lowrank_kernels.benchmark.timing import Device

        return min(Device().times(call, 2 + ROUNDS)[2:])
    seconds = []
    while len(seconds) < 2 + ROUNDS and (len(seconds) < 3 or sum(seconds) < SECONDS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])


def measure(device: str, limits: dict[str, float]) -> None:
    """One turn: raises what ``limits`` has of each rate."""
    for name, (work, make) in LIMITS[device].items():
        limits[name] = max(work / best_seconds(make(), device), limits.get(name, 0.0))


def rates(limits: dict[str, float], dtype: str = "float32") -> tuple[float, float]:
    """(GB/s, GFLOP/s) that a case with activations of ``dtype`` is held against."""
    if "copy_gbs" in limits:
        return limits["copy_gbs"], limits["matmul_tflops"] * 1e3
    gflops = limits["sgemm_gflops"]
    if dtype == "bfloat16":  # a CPU without units for it is slower there
        gflops = max(gflops, limits["bf16_gflops"])
    return limits["read_gbs"], gflops
