"""Kernels for low-rank adapters on 4-bit weights. See README.md; public names only here."""

import importlib
import typing

from . import backends, distributed
from .adapter_bank import AdapterBank
from .adapter_files import load_adapter, save_adapter
from .backends import batch_invariant
from .experts import Experts4bit
from .formats import Weight4bit, quantize_4bit
from .functional import linear_4bit, lora_linear, lora_linear_4bit
from .grouped import grouped_linear_4bit, grouped_lora_linear_4bit
from .groups import linear_4bit_group, lora_linear_4bit_group
from .int8 import int8_activations
from .interop import accelerate_hook, checkpoint_hook, experts_hook, peft_hook
from .interop import transformers_hook as _transformers
from .interop.on_import import on_import as _on_import
from .model_adapters import (
    adapters,
    add_adapter,
    delete_adapter,
    disable_adapters,
    enable_adapters,
    merge_adapter,
    set_adapter,
    unmerge_adapter,
)
from .multi_lora.functional import multi_lora_
from .nn import Linear4bit, LoRALinear4bit
from .replace import replace_linear

peft_hook.register()
checkpoint_hook.register()
experts_hook.register()

__version__ = "0.1.0"
__all__ = [
    "AdapterBank",
    "Experts4bit",
    "Linear4bit",
    "LoRALinear4bit",
    "Weight4bit",
    "adapters",
    "add_adapter",
    "backends",
    "batch_invariant",
    "delete_adapter",
    "disable_adapters",
    "distributed",
    "enable_adapters",
    "grouped_linear_4bit",
    "grouped_lora_linear_4bit",
    "int8_activations",
    "linear_4bit",
    "linear_4bit_group",
    "load_adapter",
    "lora_linear",
    "lora_linear_4bit",
    "lora_linear_4bit_group",
    "merge_adapter",
    "multi_lora_",
    "quantize_4bit",
    "replace_linear",
    "save_adapter",
    "set_adapter",
    "unmerge_adapter",
]

_on_import("transformers.quantizers.auto", _transformers.register)
_on_import("transformers.modeling_utils", _transformers.register_models)
_on_import("accelerate.utils.modeling", accelerate_hook.install)

_LATER = ("analysis", "rlhf")  # modules that `import lowrank_kernels` leaves alone

if typing.TYPE_CHECKING:
    from . import analysis, rlhf
    from .interop.transformers_quantizer import LowRankConfig, pretrained_config


def __getattr__(name: str):
    """What needs another library, which is imported no sooner than somebody asks."""
    if name in _transformers.NAMES:
        return _transformers.public(name)
    if name in _LATER:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
