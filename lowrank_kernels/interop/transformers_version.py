"""Which versions of transformers the library is tested with, and which one is here."""

from __future__ import annotations

import re

TESTED = ("5.20", "5.24")  # from the first on, below the second; pyproject.toml says the same


def version() -> str | None:
    """What is installed; None without transformers. An import that fails within it raises what it raises."""
    try:
        import transformers  # not at the top, and not kept: it replaces itself once in sys.modules
    except ModuleNotFoundError as error:
        if error.name == "transformers":
            return None
        raise
    return transformers.__version__


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor; without the package packaging, which is no dependency of ours."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def below(limit: str) -> bool:
    return _numbers(version()) < _numbers(limit)
