"""The operators as Triton kernels, one module per operator and its variants.

They run where the CUDA library does not: GPUs that it was not compiled for, other vendors' GPUs, installations
without a compiler. With ``TRITON_INTERPRET=1`` in the environment of the process the same functions run on CPU
tensors, statement by statement in numpy: for tests.

This package imports triton only when an operator is asked for (:func:`kernel_of`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Callable

import torch

from ..arguments import first_tensor

# Operators in a module that has another name.
EXCEPTIONS = {
    "double_quantize": "quantize",
    "grouped_lora_linear_4bit": "grouped_linear",
    "grouped_lora_linear_4bit_backward": "grouped_linear",
}
OLDEST = (3, 6)  # of the versions that are tested; pyproject.toml has the newest as well
INSTALL_COMMAND = "pip install 'triton>={}.{}'".format(*OLDEST)


def installed() -> bool:
    """Whether there is a package triton; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether this process runs kernels in triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def module_of(op: str) -> str:
    """The module here that has a function of the operator's name: the name less what tells its variants apart."""
    return EXCEPTIONS.get(op) or re.sub("_4bit|_dx|_group|_backward|_$", "", op)


@functools.cache
def _check_version() -> None:
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST:
        raise RuntimeError(
            f"triton: expected version {OLDEST[0]}.{OLDEST[1]} or newer, got {triton.__version__}; "
            f"install: {INSTALL_COMMAND}"
        )


def kernel_of(name: str) -> Callable:
    """The operator ``name`` on tensors of the devices that triton serves; imported at its first call."""

    @functools.cache
    def function() -> Callable:
        _check_version()
        return getattr(importlib.import_module(f".{module_of(name)}", __name__), name)

    def run(*args):
        first = first_tensor(args)
        if first.is_cuda:
            with torch.cuda.device(first.device):
                return function()(*args)
        return function()(*args)

    return run
