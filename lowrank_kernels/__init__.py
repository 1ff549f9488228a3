"""Kernels for low-rank adapters on 4-bit weights. See README.md; public names only here."""

from . import backends
from .formats import Weight4bit, quantize_4bit
from .functional import linear_4bit, lora_linear, lora_linear_4bit

__version__ = "0.1.0"
