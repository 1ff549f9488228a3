"""The way to transformers for a package that does not import it: registration, and the names that need it."""

from __future__ import annotations

import importlib

from . import transformers_version as versions

NAMES = ("LowRankConfig", "pretrained_config")


def register(module) -> None:
    """When transformers.quantizers.auto has been imported. An old one must go on working without us."""
    if not versions.below(versions.TESTED[0]):
        importlib.import_module(".transformers_quantizer", __package__)  # registers itself


def public(name: str):
    """What ``lowrank_kernels.<name>`` is, for one of ``NAMES``; ImportError if it cannot be had."""
    if versions.below(versions.TESTED[0]):
        raise ImportError(
            f"{name}: expected transformers >= {versions.TESTED[0]}, < {versions.TESTED[1]}, "
            f"got {versions.version()}"
        )
    return getattr(importlib.import_module(".transformers_quantizer", __package__), name)
