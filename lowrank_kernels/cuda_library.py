"""The CUDA library of this installation: which GPUs it was compiled for, and what of that is here.

An entry of a list of architectures is as in ``TORCH_CUDA_ARCH_LIST``, and runs on

=========== ===================================================================================
``8.6``     GPUs of the same major and no lower minor capability: 8.6, 8.7, 8.9
``8.6+PTX`` the same, and every later GPU: the driver translates the PTX when it loads the library
``9.0a``    9.0 alone, with or without PTX: code with instructions that only that GPU has
``10.0f``   the family: same major, no lower minor capability; its PTX as well
=========== ===================================================================================
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Capability = tuple[int, int]

# Capabilities whose kernels need the instructions of one GPU alone.
_SPECIFIC = {(9, 0): "9.0a"}


@dataclass(frozen=True)
class Device:
    """A GPU that torch sees."""

    index: int
    name: str
    capability: Capability
    covered: bool  # the library has code for it


@dataclass(frozen=True)
class Status:
    """What this installation can do with the GPUs of this machine."""

    built: str  # one line: the architectures and compiler of the library, or that there is none
    torch: str  # the CUDA version of torch, or that it is a CPU build
    driver: str  # the newest CUDA version that the driver supports, or that there is none
    devices: tuple[Device, ...]
    problems: tuple[str, ...]  # why a GPU that should work does not: one line each, with the remedy
    # Likewise, of GPUs that the library has no code for: a problem unless Triton serves them.
    lacking: tuple[str, ...]
    note: str | None  # why no GPU is used, where that is nobody's mistake


def path() -> pathlib.Path:
    """Where the CUDA library is if it was built."""
    return pathlib.Path(__file__).with_name("liblowrank_cuda.so")


@functools.cache
def _library() -> ctypes.CDLL | None:
    # The CUDA runtime is inside the library, so it opens on machines without a driver too.
    return ctypes.CDLL(str(path())) if path().exists() else None


def _text(function: str) -> str:
    call = getattr(_library(), function)
    call.restype = ctypes.c_char_p
    return call().decode()


def architectures() -> tuple[str, ...]:
    """What the library was compiled for, as ("8.0", "9.0a", "12.0+PTX"); empty if it was not built.

    Raises OSError if there is a file that is not a library for this machine.
    """
    return tuple(_text("lk_cuda_architectures").split()) if _library() else ()


def build_info() -> str:
    """Compiler and architectures of the library, one line; "" if it was not built."""
    return _text("lk_cuda_build_info") if _library() else ""


def covers(architectures: Sequence[str], capability: Capability) -> bool:
    """Whether a library compiled for ``architectures`` has code for a GPU of this compute capability."""
    return any(_runs(entry, capability) for entry in architectures)


def _runs(entry: str, capability: Capability) -> bool:
    match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
    if match is None:
        raise ValueError(f"architectures: expected entries such as 8.6 or 9.0a, got {entry!r}")
    compiled = (int(match[1]), int(match[2]))
    if match[3] == "a":
        return capability == compiled
    if capability[0] == compiled[0]:
        return capability >= compiled
    return bool(match[4]) and match[3] != "f" and capability > compiled


def rebuild_hint(capability: Capability) -> str:
    """The command that builds the library for GPUs of this compute capability."""
    entry = _SPECIFIC.get(capability) or "{}.{}".format(*capability)
    variables = f'TORCH_CUDA_ARCH_LIST="{entry}" LOWRANK_BUILD_CUDA=1'
    return f"{variables} pip install -e . --no-build-isolation"


def driver() -> Capability | None:
    """The newest CUDA version that the NVIDIA driver supports; None where there is no driver."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


def status() -> Status:
    """Looks at the library, torch, the driver and the GPUs; never raises."""
    try:
        compiled, built, broken = architectures(), build_info() or "not built", None
    except (OSError, AttributeError) as error:
        compiled, built, broken = (), "broken", f"{path()} cannot be opened: {error}"
    found = driver()
    devices, reason = _devices(compiled)
    problems, lacking, note = [broken] if broken else [], [], None
    if torch.version.cuda is None:
        note = "torch is a CPU build; for GPUs install a CUDA build of torch"
    elif reason is not None:
        what = f"torch finds no usable GPU: {reason}"
        if compiled:
            problems.append(what)
        else:
            note = what
    elif not compiled:
        lacking += [] if broken else [_not_built(devices)]
    else:
        lacking += [_not_covered(d, compiled) for d in devices if not d.covered]
        problems += _driver_too_old(built, found)
    return Status(
        built=built,
        torch=torch.version.cuda or "CPU build",
        driver="{}.{}".format(*found) if found else "none",
        devices=devices,
        problems=tuple(problems),
        lacking=tuple(lacking),
        note=note,
    )


def _devices(compiled: Sequence[str]) -> tuple[tuple[Device, ...], str | None]:
    """The GPUs; or none and what torch says about that."""
    if torch.version.cuda is None:
        return (), None
    with warnings.catch_warnings():  # is_available() warns of what init() raises
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            try:
                torch.cuda.init()
            except (RuntimeError, AssertionError) as error:
                return (), str(error).strip().splitlines()[0]
            return (), "torch.cuda.is_available() is False"
    found = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        found.append(Device(index, name, capability, covers(compiled, capability)))
    return tuple(found), None


def _not_built(devices: Sequence[Device]) -> str:
    return f"the CUDA library is not built; build: {rebuild_hint(devices[0].capability)}"


def _not_covered(device: Device, compiled: Sequence[str]) -> str:
    capability = "{}.{}".format(*device.capability)
    return (
        f"cuda:{device.index} is {device.name}, compute capability {capability}, but the library was compiled "
        f"for {' '.join(compiled)}; rebuild: {rebuild_hint(device.capability)}"
    )


def _driver_too_old(built: str, found: Capability | None) -> list[str]:
    """A library needs a driver of its own CUDA major version or a later one, whatever torch needs."""
    match = re.search(r"nvcc (\d+)\.", built)
    if match is None or found is None or found[0] >= int(match[1]):
        return []
    version = "{}.{}".format(*found)
    return [
        f"the library was compiled by CUDA {match[1]}, but the driver supports only CUDA {version}: "
        f"update the driver, or build with a toolkit of CUDA {found[0]}"
    ]
