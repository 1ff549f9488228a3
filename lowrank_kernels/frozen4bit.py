"""``Frozen4bit``: what every layer with a frozen 4-bit weight has: the weight, bitsandbytes' keys, merging."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable

import torch
from torch import nn

from . import huge_pages
from .formats import Weight4bit, quantize_4bit
from .packed import Params4bit, plain
from .quant_state import KEYS_IN_WORDS
from .schema import FLOAT_DTYPES

# Field of Weight4bit -> buffer. bitsandbytes' names; "code" is taken in an exported GraphModule.
_BUFFERS = {
    "absmax": "absmax",
    "code": "quant_map",
    "nested_absmax": "nested_absmax",
    "nested_code": "nested_quant_map",
    "nested_offset": "nested_offset",
}


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether it is a shard that torch.distributed's fully_shard (FSDP2) made of a parameter."""
    module = sys.modules.get("torch.distributed.tensor")  # slow to import, and not needed before
    return module is not None and isinstance(tensor, module.DTensor)


def apply_to_bytes(fn: Callable, tensor: torch.Tensor) -> torch.Tensor:
    """``fn`` of Module._apply on the bytes of ``tensor``: moves, shares, empties; never casts."""
    flat = plain(tensor).reshape(-1).view(torch.uint8)
    out = fn(flat)
    if out is flat:
        return plain(tensor)  # Module._apply may wrap it in an nn.Parameter
    if out.dtype != torch.uint8:  # Module.type() casts integers too
        out = flat.to(out.device)
    return out.view(tensor.dtype).reshape(tensor.shape)


class _ReplicasParameters(dict):
    """The parameters of a replica, which nn.DataParallel keeps as attributes: found there, but not listed."""

    def __init__(self, attributes: dict):
        super().__init__()
        self.attributes = attributes

    def __missing__(self, name: str) -> torch.Tensor:
        return self.attributes[name]


class _AnyName:
    """Has every name that has no underscore in front, and all of them are itself."""

    def __getattr__(self, name: str) -> _AnyName:
        if name.startswith("_"):
            raise AttributeError(name)
        return self


class Frozen4bit(nn.Module):
    """A frozen 4-bit weight ``weight``, its statistics, its state dict in bitsandbytes' keys, and its merging.

    ``weight`` holds the packed bytes as bitsandbytes stores them, the statistics are non-persistent buffers. Casts
    leave all of them alone.
    """

    def _setup(self, w: Weight4bit, bias: nn.Parameter | None) -> None:
        for name in _BUFFERS.values():
            self.register_buffer(name, None, persistent=False)
        self._set_weight4bit(w)
        self.register_parameter("bias", bias)

    def _set_weight4bit(self, w: Weight4bit) -> None:
        if is_dtensor(w.packed):
            packed = nn.Parameter(w.packed.detach(), requires_grad=False)
        else:
            packed = w.packed if isinstance(w.packed, Params4bit) else Params4bit(w.packed)
            huge_pages.advise(packed)
        self.register_parameter("weight", packed)
        for field, name in _BUFFERS.items():
            self._buffers[name] = getattr(w, field)
        self._weight4bit = dataclasses.replace(w, packed=packed)
        self._unmerged: Weight4bit | None = None  # belonged to the weight that was

    def _collect(self) -> Weight4bit:
        statistics = {field: self._buffers[name] for field, name in _BUFFERS.items()}
        packed = self._parameters["weight"]
        return dataclasses.replace(self._weight4bit, packed=packed, **statistics)

    # -- what the layer holds ----------------------------------------------------------------------

    @property
    def weight4bit(self) -> Weight4bit:
        """The weight: shares its tensors with the parameter and buffers."""
        # Built once, since a decode step asks hundreds of times, and again when anything put other
        # tensors in place (a wrapper, torch.func.functional_call, ...).
        w, buffers = self._weight4bit, self._buffers
        if (
            w.packed is self._parameters["weight"]
            and w.absmax is buffers["absmax"]
            and w.code is buffers["quant_map"]
            and w.nested_absmax is buffers["nested_absmax"]
            and w.nested_code is buffers["nested_quant_map"]
            and w.nested_offset is buffers["nested_offset"]
        ):
            return w
        before, w = w.packed.dtype, self._collect()
        if (
            before.is_floating_point
            and w.packed.dtype.is_floating_point
            and w.packed.dtype != before
        ):
            raise ValueError(
                f"weight: expected packed bytes presented in {before}, got {w.packed.dtype}: something cast them "
                "(a mixed precision policy?); quant_storage=torch.uint8 is never cast"
            )
        w.validate("weight")
        self._weight4bit = w
        return w

    @property
    def W_q(self) -> torch.Tensor:
        """``weight`` by the name that tells PEFT to call :meth:`dequantize` (DoRA needs it)."""
        return self.weight

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that W had before quantization. PEFT reads it as that of a base layer in 4 bits."""
        return self._weight4bit.dtype

    @property
    def quant_type(self) -> str:
        return self._weight4bit.quant_type

    @property
    def blocksize(self) -> int:
        return self._weight4bit.blocksize

    @property
    def double_quant(self) -> bool:
        return self._buffers["nested_absmax"] is not None

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W dense ``[N, K]``, in the dtype it had before quantization unless given.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> lk.Linear4bit(64, 32).dequantize(torch.bfloat16).shape
            torch.Size([32, 64])
        """
        return self.weight4bit.dequantize(dtype)

    @staticmethod
    def _quantize_like(dense: torch.Tensor, w: Weight4bit) -> Weight4bit:
        new = quantize_4bit(dense, w.quant_type, w.blocksize, w.double_quant, w.packed.dtype)
        return dataclasses.replace(new, packed=new.packed.view(w.packed.shape))

    def _apply(self, fn, recurse=True):
        tensors = (self._parameters["weight"], *(self._buffers[name] for name in _BUFFERS.values()))
        frozen = {id(t) for t in tensors if t is not None}
        super()._apply(lambda t: apply_to_bytes(fn, t) if id(t) in frozen else fn(t), recurse)
        aside = self._unmerged
        self._set_weight4bit(self._collect())
        if aside is not None:
            moved = {name: apply_to_bytes(fn, t) for name, t in aside.tensors().items()}
            self._unmerged = dataclasses.replace(aside, **moved)
        return self

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica._parameters = _ReplicasParameters(replica.__dict__)
        return replica

    # -- merging -----------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether adapters are folded into the weight, and the weight before is kept aside."""
        return self._unmerged is not None

    @torch.no_grad()
    def _merge_weight(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Runs on ``change(W)``, float32 ``[N, K]``, quantized with W's settings; keeps W aside.

        W is the weight before any merging, so that merging again does not quantize twice.
        """
        original = self._unmerged or self.weight4bit
        merged = self._quantize_like(change(original.dequantize(torch.float32)), original)
        self._set_weight4bit(dataclasses.replace(merged, dtype=original.dtype))
        self._unmerged = original

    def _unmerge_weight(self) -> None:
        self._set_weight4bit(self._unmerged)

    # -- state dict --------------------------------------------------------------------------------

    # torch.distributed.checkpoint.state_dict walks along the parts of a key: "weight.absmax" through the
    # attribute "weight" to its "absmax", which no parameter has. It asks this method for detours.
    _entries = _AnyName()

    def _fqn_modifiers(self) -> dict[str, str]:
        return {"weight": "_entries"}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        w, key = self.weight4bit, prefix + "weight"
        if w.double_quant and w.packed.is_meta:  # no value to read; loading replaces it
            w = dataclasses.replace(w, nested_offset=torch.zeros((), device="cpu"))
        entries = w.to_bitsandbytes(key)
        for name in (f"{key}.quant_map", f"{key}.nested_quant_map"):
            if name in entries:  # layers may share a table, but safetensors refuses shared tensors
                entries[name] = entries[name].clone()
        del entries[key]
        destination.update(entries)
        if not keep_vars:
            destination[key] = plain(destination[key])

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        key = prefix + "weight"
        own = {k: v for k, v in state_dict.items() if k == key or k.startswith(key + ".")}
        if self.merged and own:
            error_msgs.append(f"{key}: the layer is merged; call unmerge() before loading")
            return
        self._warn_of_adapters(state_dict, prefix)
        rest = {k: v for k, v in state_dict.items() if k not in own}
        missing: list[str] = []
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        missing_keys += [k for k in missing if k != key or not own]
        if not own:
            return
        if is_dtensor(self.weight) and not (is_dtensor(own.get(key)) and len(own) > 1):
            error_msgs.append(
                f"{key}: this layer is sharded: expected torch.distributed.checkpoint.state_dict."
                "set_model_state_dict with the packed weight, and its statistics on every process"
            )
            return
        try:
            w = self._read_weight(own, key)
        except (TypeError, ValueError) as error:
            message = str(error)
            error_msgs.append(message if key in message else f"{key}: {message}")
            return
        if not local_metadata.get("assign_to_params_buffers", False):
            if self.weight.is_meta:
                warnings.warn(
                    f"{key}: this layer is on the meta device, so loading does nothing; "
                    "pass assign=True, or call to_empty(device=...) first",
                    stacklevel=2,
                )
                return
            copies = {n: t.to(self.weight.device, copy=True) for n, t in w.tensors().items()}
            w = dataclasses.replace(w, **copies)
        self._set_weight4bit(w)

    def _warn_of_adapters(self, state_dict, prefix: str) -> None:
        """With ``strict=False``, which torch does not tell us, adapters that the layer lacks would vanish."""
        start = prefix + "lora_A."
        names = {
            key.removeprefix(start).split(".")[0] for key in state_dict if key.startswith(start)
        }
        lost = names - set(self._modules.get("lora_A", ()))
        if lost:
            warnings.warn(
                f"load_state_dict: the adapters {sorted(lost)} of the state dict are not loaded, since layers lack "
                "them; add them first (replace_linear, add_adapter), or use save_adapter and load_adapter",
                stacklevel=2,
            )

    def _read_weight(self, entries: dict[str, torch.Tensor], key: str) -> Weight4bit:
        """The 4-bit weight in ``entries``, or a dense one quantized; ValueError if neither."""
        shape = tuple(self._weight4bit.shape)
        if entries.keys() != {key}:
            w = Weight4bit.from_bitsandbytes(entries, key)
            if tuple(w.shape) != shape:
                raise ValueError(
                    f"{key}: expected shape [out_features, in_features] = {shape}, "
                    f"got {tuple(w.shape)}"
                )
            return w
        dense = entries[key]
        got = type(dense).__name__
        if isinstance(dense, torch.Tensor):
            if dense.dtype in FLOAT_DTYPES and tuple(dense.shape) == shape:
                return self._quantize_like(dense, self.weight4bit)
            got = f"{dense.dtype} of shape {tuple(dense.shape)}"
        raise ValueError(
            f"{key}: expected a float32, bfloat16 or float16 weight of shape {shape}, or packed "
            f"bytes with {key}.absmax, .quant_map and .{KEYS_IN_WORDS}, "
            f"got {got} alone"
        )
