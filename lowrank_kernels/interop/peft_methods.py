"""PEFT's other methods (IA3, OFT, VeRA, ...) on ``Linear4bit``: which of them work, and how they merge.

A method works on packed weights if its forward calls the base layer, and is refused if it reads the base
layer's weight. Those that work merge by their own code: into a dense copy of the weight, which is then quantized
once with the layer's settings. The original is kept aside, so ``unmerge`` restores its bytes exactly.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.peft_types import PeftType
from torch import nn

from ..linear4bit import Linear4bit

# Tested against the same method on the dense weight: forward, gradients and merging.
WORKING = frozenset(
    {
        "ADALORA", "BEFT", "BOFT", "C3A", "FOURIERFT", "GRALORA", "IA3", "LILY", "LORA", "MISS",
        "OFT", "POLY", "PVERA", "RANDLORA", "ROAD", "VBLORA", "VERA", "WAVEFT",
    }
)  # fmt: skip


def check_target(peft_config, target: nn.Module) -> None:
    """Raises ValueError where the method of ``peft_config`` cannot work on ``target``."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    method = PeftType(peft_config.peft_type).value
    if isinstance(base, Linear4bit) and method not in WORKING:
        raise ValueError(
            f"peft_type: expected one of {sorted(WORKING)} for a Linear4bit, got {method!r}, which needs a dense "
            "weight in its base layer to read, to train or to replace, or was not tested on 4 bits; leave these layers "
            "dense (replace_linear's exclude_modules) or do not target them"
        )


@contextlib.contextmanager
def dense_base(layer: nn.Module, bias: bool = False) -> Iterator[nn.Linear]:
    """``layer``'s Linear4bit is a dense layer meanwhile, of the weight before any merging.

    Its weight is a copy in float32 where ``bias`` asks for one of the bias too, for merging; else in the dtype that
    it had before quantization, for reading.
    """
    base = layer.base_layer
    w = base._unmerged or base.weight4bit
    weight = w.dequantize(torch.float32 if bias else None)
    dense = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if bias and base.bias is not None:
        original = base.bias if layer._bias_aside is None else layer._bias_aside
        dense.bias = nn.Parameter(
            original.detach().to(torch.float32, copy=True), requires_grad=False
        )
    layer.base_layer = dense.train(base.training)
    try:
        yield dense
    finally:
        layer.base_layer = base


def adopt_layers(model: nn.Module) -> None:
    """Has the layers of ``model`` that are on a Linear4bit merge and unmerge as this module says."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), Linear4bit):
            _adopt_class(type(module))


def _adopt_class(cls: type) -> None:
    """Changes the class itself, which then serves dense layers as before: instances stay copyable and picklable."""
    cls = next(owner for owner in cls.__mro__ if "merge" in owner.__dict__)
    if "_merges_into_4_bits" in cls.__dict__:
        return
    cls._merges_into_4_bits = True
    cls._bias_aside = None
    cls.merge, cls.unmerge = _merging(cls.merge), _unmerging(cls.unmerge)
    if not hasattr(cls, "unload_and_optionally_merge_module"):
        cls.unload_and_optionally_merge_module = _unload


def _merging(theirs):
    @functools.wraps(theirs)
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()
        if not isinstance(base, Linear4bit):
            return theirs(self, safe_merge=safe_merge, adapter_names=adapter_names)
        if not (names := check_adapters_to_merge(self, adapter_names)):
            return
        if self.base_layer is not base:
            raise NotImplementedError(
                "merge: several methods of PEFT on one Linear4bit are not merged; unload those inside first"
            )
        before = list(self.merged_adapters)
        with dense_base(self, bias=True) as dense:
            original = dense.weight.detach().clone()
            self.merged_adapters = []
            try:
                theirs(self, safe_merge=safe_merge, adapter_names=[*before, *names])
                after = self.merged_adapters
            finally:
                self.merged_adapters = before
        if dense.bias is not None and not dense.bias.isfinite().all():
            raise ValueError(f"merge: expected finite biases, those of {names} are not")
        if not torch.equal(dense.weight, original):
            base._merge_weight(lambda _: dense.weight.detach())  # raises for what is not finite
        elif base.merged:
            base._unmerge_weight()
        if dense.bias is not None:
            if self._bias_aside is None:
                self._bias_aside = base.bias.detach().clone()
            base.bias.data.copy_(dense.bias)
        self.merged_adapters = after

    return merge


def _unmerging(theirs):
    @functools.wraps(theirs)
    def unmerge(self) -> None:
        base = self.get_base_layer()
        if not isinstance(base, Linear4bit):
            return theirs(self)
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if base.merged:
            base._unmerge_weight()
        if self._bias_aside is not None:
            base.bias.data.copy_(self._bias_aside)
            self._bias_aside = None
        self.merged_adapters = []

    return unmerge


def _unload(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
    """The base layer without this one, for PEFT's ``unload`` and ``merge_and_unload``."""
    if merge:
        self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
    base = self.get_base_layer()
    if isinstance(base, Linear4bit):
        base._unmerged = None  # nobody is left to restore it
    return base
