"""Starting a kernel."""

from __future__ import annotations

import triton

from .elements import INTERPRETED


def launch(kernel, programs: int, *args, **options) -> None:
    """Runs ``programs`` programs of a kernel, none if that is 0.

    Products and sums are never fused unless a kernel says so: scales are defined by two roundings.
    """
    if programs:
        kernel[(programs,)](*args, **options, enable_fp_fusion=False)


def has_prmt() -> bool:
    """Whether kernels are compiled to NVIDIA's instructions."""
    if INTERPRETED:
        return False
    return triton.runtime.driver.active.get_current_target().backend == "cuda"
