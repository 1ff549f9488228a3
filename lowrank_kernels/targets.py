"""Which modules a caller means: PEFT's rules for names and patterns."""

from __future__ import annotations

import re
from collections.abc import Iterable


def matches(name: str, patterns: str | Iterable[str]) -> bool:
    """PEFT's rule: a string is a regular expression for all of ``name``, a list holds its ends."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def read_patterns(argument: str, value: object) -> str | list[str]:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"{argument}: expected a regular expression, got {value!r}: {error}"
            ) from None
        return value
    names = list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument}: expected a string or strings, got {value!r}")
    return names
