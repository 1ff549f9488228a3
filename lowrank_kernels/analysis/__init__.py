"""What adapters learned, and what the model forgot."""

import importlib
import typing

from .forgetting import Forgetting, Likelihood, distinct, forgetting
from .spectrum import LayerSpectrum, Spectrum, spectrum, truncate

_LATER = {"ForgettingCallback": "callback"}  # needs transformers

__all__ = [
    "Forgetting",
    "LayerSpectrum",
    "Likelihood",
    "Spectrum",
    "distinct",
    "forgetting",
    "spectrum",
    "truncate",
    *_LATER,
]

if typing.TYPE_CHECKING:
    from .callback import ForgettingCallback


def __getattr__(name: str):
    if name in _LATER:
        return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
