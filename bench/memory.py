"""What a call takes beyond its outputs: growth of the peak resident set, an operator to a process.

The calls of a process go from few tokens to many, and scratch memory is kept between calls, so each
figure holds whatever the calls before it left behind. A process runs this file:
``python -m bench.memory NAME NxK THREADS M...``.
"""

from __future__ import annotations

import gc
import json
import os
import pathlib
import subprocess
import sys

import torch

import lowrank_kernels as lk
from lowrank_kernels.benchmark import providers
from lowrank_kernels.benchmark.case import Case
from lowrank_kernels.benchmark.harness import Provider

from . import variants
from .suite import RANK

ROOT = pathlib.Path(__file__).parent.parent
COMPARED = "dequantize + matmul"  # what fused calls avoid
# name -> (operator, provider)
PROVIDERS = {
    "linear_4bit": ("linear_4bit", Provider(providers.linear_lowrank)),
    "linear_4bit_dx": ("linear_4bit_dx", Provider(providers.dx_lowrank)),
    "lora_linear_4bit": ("lora_linear_4bit", Provider(providers.lora_lowrank)),
    "lora_linear_4bit_fwd_bwd": ("lora_linear_4bit_fwd_bwd", Provider(providers.lora_lowrank)),
    "linear_4bit, int8 activations": ("linear_4bit", variants.int8),
    COMPARED: ("linear_4bit", Provider(providers.linear_dequantize)),
}
# What is freed goes back to the system at once, so that no call runs in memory that another left.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
STATUS, RESET = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def measure(N: int, K: int, tokens: tuple[int, ...], threads: int) -> dict:
    """{"N", "K", "threads", "extra": name -> M -> bytes, or why there are none}."""
    extra: dict[str, dict[str, int] | str] = {}
    for name in PROVIDERS:
        command = [sys.executable, "-m", "bench.memory", name, f"{N}x{K}", str(threads)]
        command += map(str, sorted(tokens))
        how = {"cwd": ROOT, "env": os.environ | ENVIRONMENT, "capture_output": True, "text": True}
        done = subprocess.run(command, **how)
        failed = done.returncode != 0
        lines = (done.stderr if failed else done.stdout).strip().splitlines()
        last = lines[-1] if lines else f"exit code {done.returncode}"
        extra[name] = last if failed else json.loads(last)
    return {"N": N, "K": K, "threads": threads, "extra": extra}


# -- in the process --------------------------------------------------------------------------------


def _resident(field: str) -> int:
    """Bytes: "VmRSS" now, "VmHWM" the most since the last reset."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def _case(op: str, N: int, K: int, M: int) -> Case:
    return Case(op, N, K, M, cache="hot", R=RANK if "lora" in op else 0)


def beyond_outputs(name: str, N: int, K: int, tokens: list[int]) -> dict[int, int]:
    """M -> how far the resident set rose above what it was before the first call, less the outputs."""
    op, provider = PROVIDERS[name]
    # What the first calls of a process cost whoever makes them: threads, Python's own, torch's.
    torch.mm(*torch.randn(2, 512, 512))
    with lk.backends.use("reference"):
        provider.calls(_case(op, 64, 64, 1))[0]()
    calls = {M: provider.calls(_case(op, N, K, M))[0] for M in tokens}
    gc.collect()
    gc.disable()
    before, found = _resident("VmRSS"), {}
    for M, call in calls.items():
        RESET.write_text("5")
        with provider.context():
            outputs = call()
        y = 4 * M * N if op.endswith("fwd_bwd") else 0  # where backward starts
        made = sum(t.nbytes for t in (outputs if isinstance(outputs, tuple) else (outputs,)))
        found[M] = max(0, _resident("VmHWM") - before - made - y)
        del outputs
    return found


if __name__ == "__main__":
    name, shape, threads, *rows = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(beyond_outputs(name, *map(int, shape.split("x")), list(map(int, rows)))))
