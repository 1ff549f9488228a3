"""Which versions of transformers the library is tested with, and which one is here."""

from __future__ import annotations

TESTED = ("5.20", "5.24")  # from the first on, below the second; pyproject.toml says the same


def version() -> str:
    import transformers  # not at the top, and not kept: it replaces itself once in sys.modules

    return transformers.__version__


def below(limit: str) -> bool:
    from packaging.version import Version

    return Version(version()) < Version(limit)
