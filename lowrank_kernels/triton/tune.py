"""Choosing the fastest of a few configurations, once per problem and GPU; what was chosen is kept on disk.

The file is ``lowrank_kernels/triton-<version>-<GPU>.json`` in the user's cache folder (``XDG_CACHE_HOME``, else
``~/.cache``). It is replaced in one step, so other processes see the old or the new one; one that cannot be read
is ignored. ``LOWRANK_AUTOTUNE=0`` takes the first configuration everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton

from .primitives import INTERPRETED


class Config(NamedTuple):
    """Sides of a tile, steps of a sum, how many programs share one, and how a program is compiled."""

    rows: int
    columns: int
    depth: int
    split_k: int
    warps: int
    stages: int


def cache_file(gpu: str) -> pathlib.Path:
    """Where the choices for GPUs of this name are kept."""
    folder = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    name = re.sub(r"\W+", "-", gpu)
    return pathlib.Path(folder) / "lowrank_kernels" / f"triton-{triton.__version__}-{name}.json"


def load(file: pathlib.Path) -> dict[str, Config]:
    """What the file holds; nothing for a file that is missing or damaged, and without entries that are."""
    try:
        entries = json.loads(file.read_text()).items()
    except (OSError, ValueError, AttributeError):
        return {}
    return {
        key: Config(*values)
        for key, values in entries
        if isinstance(values, list)
        and len(values) == len(Config._fields)
        and all(type(value) is int and value > 0 for value in values)
    }


def save(file: pathlib.Path, key: str, config: Config) -> None:
    """Adds a choice to what the file holds by now; a folder that cannot be written to is no error."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        entries = load(file) | {key: config}
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
            json.dump(entries, temporary, indent=0)
        os.replace(temporary.name, file)


@functools.cache
def _choices(gpu: str) -> dict[str, Config]:
    """The choices of this process, which begin with those on disk."""
    return load(cache_file(gpu))


def _can_measure(device: torch.device) -> bool:
    if os.environ.get("LOWRANK_AUTOTUNE") == "0" or INTERPRETED or device.type != "cuda":
        return False
    return not torch.cuda.is_current_stream_capturing()


def choose(
    key: str, configs: Sequence[Config], run: Callable[[Config], object], device: torch.device
) -> Config:
    """The fastest of ``configs`` for the problem ``key``: from memory, from disk, or measured by ``run``.

    The first one where nothing can be measured: while a CUDA graph is captured, or without a GPU.
    """
    if not _can_measure(device):
        return configs[0]
    gpu = torch.cuda.get_device_name(device)
    choices = _choices(gpu)
    if choices.get(key) not in configs:
        choices[key] = min(configs, key=lambda config: _milliseconds(config, run))
        save(cache_file(gpu), key, choices[key])
    return choices[key]


def _milliseconds(config: Config, run: Callable[[Config], object]) -> float:
    """Infinite for a configuration that does not fit on this GPU."""
    try:
        return triton.testing.do_bench(lambda: run(config), warmup=5, rep=20)
    except triton.runtime.errors.OutOfResources:
        return float("inf")
