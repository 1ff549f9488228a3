"""The way to transformers for a package that does not import it: registration, and the names that need it."""

from __future__ import annotations

import importlib

TESTED = ("5.20", "5.24")  # from the first on, below the second; pyproject.toml says the same
NAMES = ("LowRankConfig", "pretrained_config")


def version() -> str:
    import transformers  # not at the top, and not kept: it replaces itself once in sys.modules

    return transformers.__version__


def below(limit: str) -> bool:
    from packaging.version import Version

    return Version(version()) < Version(limit)


def register(module) -> None:
    """When transformers.quantizers.auto has been imported. An old one must go on working without us."""
    if not below(TESTED[0]):
        importlib.import_module(".transformers_quantizer", __package__)  # registers itself


def public(name: str):
    """What ``lowrank_kernels.<name>`` is, for one of ``NAMES``; ImportError if it cannot be had."""
    if below(TESTED[0]):
        raise ImportError(
            f"{name}: expected transformers >= {TESTED[0]}, < {TESTED[1]}, got {version()}"
        )
    return getattr(importlib.import_module(".transformers_quantizer", __package__), name)
