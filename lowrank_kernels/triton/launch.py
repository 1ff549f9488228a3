"""Starting a kernel."""

from __future__ import annotations

import torch
import triton

from .primitives import INTERPRETED


def launch(kernel, programs: int, *args, **options) -> None:
    """Runs ``programs`` programs of a kernel, none if that is 0.

    Products and sums are never fused unless a kernel says so: scales are defined by two roundings.
    """
    if programs:
        kernel[(programs,)](*args, **options, enable_fp_fusion=False)


def on_nvidia() -> bool:
    """Whether kernels are compiled to NVIDIA's instructions."""
    if INTERPRETED:
        return False
    return triton.runtime.driver.active.get_current_target().backend == "cuda"


def precision_of(activations: torch.dtype) -> str:
    """How float32 products are made: exactly, or, of 16-bit activations, on NVIDIA's tensor cores.

    There each operand is split in two tf32 of 11 bits: 2^-22 of a product is lost, of a 16-bit activation nothing.
    """
    return "ieee" if activations == torch.float32 or not on_nvidia() else "tf32x3"
