"""What transformers runs on each tensor that it reads: quantize it, or put a quantized weight together."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer

from ..experts import lies_transposed
from ..formats import Weight4bit, quantize_4bit
from ..nn import Linear4bit, LoRALinear4bit
from ..packed import Params4bit
from ..quant_state import KEYS
from . import transformers_adapters as adapters_in_files

# Longest first: up to transformers 5.22 the first that a key begins with takes it.
_ENTRIES = (
    *sorted((f"weight.{key}" for key in KEYS), key=len, reverse=True),
    "weight.nested_quant_map",
    "weight.nested_absmax",
    "weight.quant_map",
    "weight.absmax",
    "weight",
)
SUFFIXES = [entry.removeprefix("weight") for entry in _ENTRIES]


def _one(value: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    return value[0] if isinstance(value, list) else value


def _install(
    model: nn.Module, name: str, weight: Weight4bit, missing: Collection[str]
) -> nn.Parameter:
    """Puts a Linear4bit around ``weight``, the parameter ``name``, in place of the dense layer."""
    path = name.rpartition(".")[0]
    old = model.get_submodule(path)
    if not isinstance(old, (nn.Linear, Conv1D)):
        raise ValueError(f"{name}: expected a weight of a linear layer, got a {type(old).__name__}")
    shape = adapters_in_files.shape_of(old)
    if isinstance(old.weight, DTensor):
        raise ValueError(f"{name}: 4-bit weights cannot be loaded with tensor parallelism")
    if tuple(weight.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(weight.shape)}")
    adapters_in_files.check_present(path, old, missing)
    kind = LoRALinear4bit if hasattr(old, "lora_A") else Linear4bit
    new = kind.from_weight(weight, old.bias).train(old.training)
    if kind is LoRALinear4bit:
        adapters_in_files.take_over(new, old)
    # transformers initialises what no file had; it must not touch the bytes.
    new._is_hf_initialized = f"{path}.bias" not in missing
    # It also replaces every non-persistent buffer by an empty one; until after_loading we have none.
    new._non_persistent_buffers_set.clear()
    model.set_submodule(path, new)
    return new.weight


def _keep_stack(
    quantizer: HfQuantizer, model: nn.Module, name: str, weight: Weight4bit
) -> nn.Parameter:
    """Puts the packed bytes of a stack in the place of the 3-D parameter ``name``, until all are read.

    transformers compares shapes, and sets the parameter itself.
    """
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    E, *shape = quantizer.stack_shapes[name]
    if lies_transposed(module, weight) != module.is_transposed:
        shape = shape[::-1]
    if tuple(weight.shape) != (E, *shape):
        raise ValueError(f"{name}: expected shape {(E, *shape)}, got {tuple(weight.shape)}")
    packed = Params4bit(weight.packed)
    module._parameters[key] = packed
    quantizer.stacks[name] = dataclasses.replace(weight, packed=packed)
    return packed


def after_loading(layer: Linear4bit) -> None:
    layer._non_persistent_buffers_set.update(layer._buffers)


class Quantize(ConversionOps):
    """Quantizes a dense weight as soon as it is read."""

    def __init__(self, quantizer: HfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict, model=None, missing_keys=(), **kwargs):
        return {
            name: self._quantize(name, _one(v), model, missing_keys)
            for name, v in input_dict.items()
        }

    def _quantize(self, name, value, model, missing):
        if not self.quantizer.param_needs_quantization(model, name):
            return value
        stacked = name in self.quantizer.stacks
        if not stacked and isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D):
            value = value.T.contiguous()
        try:
            weight = quantize_4bit(value, *self.quantizer.quantization_config.quantize_args)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        if stacked:
            return _keep_stack(self.quantizer, model, name, weight)
        return _install(model, name, weight, missing)


class Deserialize(ConversionOps):
    """Joins the tensors that bitsandbytes' format has for one weight. A dense weight passes."""

    hf_quantizer = True  # for transformers: what this reads must not be cast

    def __init__(self, dtype: torch.dtype, adapters: Collection[str] = ()) -> None:
        self.dtype, self.adapters = dtype, adapters  # names of parameters, which keep their dtype

    def convert(self, input_dict, full_layer_name=None, model=None, missing_keys=(), **kwargs):
        name = full_layer_name
        entries = {name + key.removeprefix("weight"): _one(v) for key, v in input_dict.items()}
        if entries.keys() == {name}:
            return {"weight": self._cast(entries[name], model, name)}
        weight = Weight4bit.from_bitsandbytes(entries, name)
        return {"weight": _install(model, name, weight, missing_keys)}

    def _cast(self, dense: torch.Tensor, model, name: str) -> torch.Tensor:
        # Where this class has its way, transformers does not cast the weights of norms and embeddings either.
        if name in self.adapters:
            return dense
        if not dense.is_floating_point():
            if isinstance(model.get_submodule(name.rpartition(".")[0]), (nn.Linear, Conv1D)):
                raise ValueError(
                    f"{name}: expected a floating dtype, or packed bytes with {name}.absmax and others, "
                    f"got {dense.dtype} alone"
                )
            return dense
        dtype = self.dtype
        for pattern, other in model._get_dtype_plan(dtype).items():
            if re.search(pattern.replace("*", ".*"), name):
                dtype = other
        return dense.to(dtype)


class DeserializeStack(ConversionOps):
    """Joins the tensors that bitsandbytes' format has for one stack of experts. A dense stack passes."""

    hf_quantizer = True

    def __init__(self, quantizer: HfQuantizer, tail: str) -> None:
        self.quantizer, self.tail = quantizer, tail

    def __deepcopy__(
        self, memo: dict
    ) -> DeserializeStack:  # each parameter gets one; they share the quantizer
        return DeserializeStack(self.quantizer, self.tail)

    def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
        name, tail = full_layer_name, self.tail
        entries = {
            name + key.removesuffix("$").replace("\\", "").removeprefix(tail): _one(value)
            for key, value in input_dict.items()
        }
        if entries.keys() == {name}:
            dense = entries[name]
            return {tail: dense.to(self.quantizer.dtype) if dense.is_floating_point() else dense}
        weight = Weight4bit.from_bitsandbytes(entries, name)
        return {tail: _keep_stack(self.quantizer, model, name, weight)}


class DeserializeMxfp4(DeserializeStack):
    """Takes blocks and scales of an MXFP4 checkpoint over as they are."""

    def __deepcopy__(self, memo: dict) -> DeserializeMxfp4:
        return DeserializeMxfp4(self.quantizer, self.tail)

    def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
        parts = {key.removesuffix("$").rpartition("_")[2]: _one(v) for key, v in input_dict.items()}
        if parts.keys() != {"blocks", "scales"}:
            raise ValueError(f"{full_layer_name}: expected blocks and scales, got {list(parts)}")
        try:
            weight = Weight4bit.from_mxfp4(parts["blocks"], parts["scales"], self.quantizer.dtype)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{full_layer_name}: {error}") from None
        return {self.tail: _keep_stack(self.quantizer, model, full_layer_name, weight)}


def stack_deserializers(quantizer: HfQuantizer) -> list[WeightConverter]:
    """One for each way in which the names of stacks end, such as "experts.down_proj"."""
    tails = dict.fromkeys(".".join(name.split(".")[-2:]) for name in quantizer.stacks)
    if quantizer.quantization_config.mxfp4:
        return [
            WeightConverter(
                [f"{tail}_blocks$", f"{tail}_scales$"], tail, [DeserializeMxfp4(quantizer, tail)]
            )
            for tail in tails
        ]
    return [
        WeightConverter(
            [f"{tail}{suffix}$" for suffix in SUFFIXES], tail, [DeserializeStack(quantizer, tail)]
        )
        for tail in tails
    ]


def deserializer(dtype: torch.dtype, adapters: Collection[str]) -> WeightConverter:
    return WeightConverter(list(_ENTRIES), "weight", [Deserialize(dtype, adapters)])


def reverts(conversion, names: Collection[str]) -> bool:
    """Whether ``conversion``, undone as a model is saved, leaves the weights ``names`` whole."""
    if not isinstance(conversion, WeightConverter):
        return True  # renames only
    if any(isinstance(op, Deserialize | DeserializeStack) for op in conversion.operations):
        return False
    try:
        undo = conversion.reverse_transform()
    except NotImplementedError:  # for any model: saving says so
        return True
    return not any(undo.rename_source_key(name)[1] is not None for name in names)
