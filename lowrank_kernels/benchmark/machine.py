"""What this machine and this installation are, for ``doctor`` and for benchmark results; nothing that names a host."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import pathlib
import platform
import re

import torch

from .. import cuda_library

PACKAGES = ("torch", "triton", "bitsandbytes", "peft", "transformers", "trl")
BUSY = 0.5  # load average from which on other programs disturb what is timed


def version(package: str) -> str | None:
    """None where a package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Python, lowrank_kernels and the packages it meets."""
    from .. import __version__

    found = {"python": platform.python_version(), "lowrank_kernels": __version__}
    return found | {name: version(name) for name in PACKAGES}


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none (macOS, Windows)."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def last_level_cache_bytes() -> int:
    """Size of the largest CPU cache, or 64 MiB where the system does not tell."""
    sizes = []
    for path in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG])", path.read_text().strip())
        if match:
            sizes.append(int(match[1]) << {"K": 10, "M": 20, "G": 30}[match[2]])
    return max(sizes, default=64 << 20)


def cpu() -> dict[str, object]:
    """Model name, the numbers that identify it, usable cores and the last-level cache."""
    info = _cpuinfo()
    numbers = (f"{key} {info[key]}" for key in ("cpu family", "model", "stepping") if key in info)
    return {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "identity": ", ".join(numbers) or platform.machine(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


def load_average() -> float | None:
    """How many programs wanted to run in the last minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


# -- a GPU -----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def l2_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size


@functools.lru_cache(maxsize=1)
def gpu() -> dict[str, object]:
    """The device and what its kernels depend on."""
    properties = torch.cuda.get_device_properties(0)
    try:
        architectures = list(cuda_library.architectures())
    except OSError:  # not loadable: the cases will say so
        architectures = None
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "driver": cuda_library.status().driver,
        "cuda": torch.version.cuda,
        "architectures": architectures,
    }
