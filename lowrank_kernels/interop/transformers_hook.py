"""The way to transformers for a package that does not import it: registration, and the names that need it."""

from __future__ import annotations

import importlib

from . import transformers_version as versions

NAMES = ("LowRankConfig", "pretrained_config")


def register(module) -> None:
    """When transformers.quantizers.auto has been imported. An old one must go on working without us."""
    if not versions.below(versions.TESTED[0]):
        importlib.import_module(".transformers_quantizer", __package__)  # registers itself


def register_models(module) -> None:
    """When transformers.modeling_utils has been imported: saving and counting of models with 4-bit layers."""
    if not versions.below(versions.TESTED[0]):
        importlib.import_module(".transformers_save", __package__).install(module)


def public(name: str):
    """What ``lowrank_kernels.<name>`` is, for one of ``NAMES``; ImportError if it cannot be had."""
    if (found := versions.version()) is None or versions.below(versions.TESTED[0]):
        raise ImportError(
            f"{name}: expected transformers >= {versions.TESTED[0]}, < {versions.TESTED[1]}, "
            f"got {found or 'none: it is not installed'}",
            name="transformers",
        )
    return getattr(importlib.import_module(".transformers_quantizer", __package__), name)
