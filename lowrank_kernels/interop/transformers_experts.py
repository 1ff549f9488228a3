"""Checkpoints with a 4-bit matrix for every expert, as bitsandbytes made them of models without stacks.

As it reads them, transformers joins the matrices of experts, ``experts.0.w1.weight`` and so on, to stacks. In 4 bits
each is packed bytes with statistics of its own; joined without a change of any value they are a stack as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
)
from transformers.quantizers.base import HfQuantizer

from ..formats import Weight4bit
from ..pieces import join
from .transformers_load import SUFFIXES, DeserializeStack, _keep_stack

_PARAMETER = ".weight"


class JoinExperts(DeserializeStack):
    """Joins the matrices of experts, each in bitsandbytes' format. Dense ones go through transformers' operations.

    ``of_model``: transformers' converter, whose sources (such as ``.experts.*.w1.weight`` and ``.experts.*.w3.weight``)
    follow each other in an expert of the stack.
    """

    def __init__(self, quantizer: HfQuantizer, of_model: WeightConverter) -> None:
        super().__init__(quantizer, of_model._original_target_patterns[0])
        self.of_model, self.sources = of_model, of_model._original_source_patterns

    def __deepcopy__(self, memo: dict) -> JoinExperts:
        return JoinExperts(self.quantizer, self.of_model)

    def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
        name = full_layer_name
        entries = {
            source: {
                suffix: input_dict[key]
                for suffix in SUFFIXES
                if (key := f"{source}{suffix}$") in input_dict
            }
            for source in self.sources
        }
        if all(found.keys() == {""} for found in entries.values()):
            return self._dense({source: found[""] for source, found in entries.items()}, **kwargs)
        counts = {len(tensors) for found in entries.values() for tensors in found.values()}
        if len(counts) != 1 or not all(entries.values()):
            raise ValueError(
                f"{name}: expected all experts in 4 bits or none, got entries of {sorted(counts)} experts"
            )
        weights = [
            self._matrix(name, source, found, e)
            for e, (source, found) in itertools.product(range(*counts), entries.items())
        ]
        try:
            weight = join(weights, self.quantizer.stack_shapes[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return {self.tail: _keep_stack(self.quantizer, model, name, weight)}

    def _matrix(self, name: str, source: str, found: dict, e: int) -> Weight4bit:
        _, rows, columns = self.quantizer.stack_shapes[name]
        key, shape = source.replace("*", str(e)), (rows // len(self.sources), columns)
        w = Weight4bit.from_bitsandbytes({f"{key}{s}": t[e] for s, t in found.items()}, key)
        if tuple(w.shape) != shape:
            raise ValueError(f"{name}: {key}: expected shape {shape}, got {tuple(w.shape)}")
        return w

    def _dense(self, tensors: dict, **kwargs) -> dict:
        kwargs |= {"source_patterns": list(self.sources), "target_patterns": [self.tail]}
        for operation in self.of_model.operations:
            tensors = operation.convert(tensors, **kwargs)
        (stack,) = tensors.values()
        stack = stack[0] if isinstance(stack, list) else stack
        return {self.tail: stack.to(self.quantizer.dtype) if stack.is_floating_point() else stack}


def join_experts(converters: Sequence, quantizer: HfQuantizer) -> list:
    """``converters`` of a model, of which those that make stacks of matrices take 4-bit ones as well."""
    return [_of_4_bits(converter, quantizer) or converter for converter in converters]


def as_of_model(converters: Sequence) -> list:
    """The converters that were given to :func:`join_experts`, which can be undone where stacks stayed dense."""
    found = []
    for converter in converters:
        operation = next(iter(getattr(converter, "operations", ())), None)
        if isinstance(operation, JoinExperts):
            operation.of_model._was_used = converter._was_used
            converter = operation.of_model
        found.append(converter)
    return found


def _of_4_bits(converter, quantizer: HfQuantizer) -> WeightConverter | None:
    if not isinstance(converter, WeightConverter) or len(converter.target_patterns) != 1:
        return None
    sources, target = converter._original_source_patterns, converter._original_target_patterns[0]
    tail = target.lstrip(".")
    if not any(f".{name}".endswith(f".{tail}") for name in quantizer.stacks):
        return None
    if not all(source.endswith(_PARAMETER) for source in sources) or not _joins(
        converter.operations
    ):
        return None
    new = WeightConverter(
        [f"{source}{suffix}$" for source in sources for suffix in SUFFIXES],
        target,
        [JoinExperts(quantizer, converter)],
    )
    new.scope_prefix = converter.scope_prefix
    new.base_model_prefix = converter.base_model_prefix
    return new


def _joins(operations: Sequence[ConversionOps]) -> bool:
    """Whether they put experts one after the other, and matrices of an expert below each other."""
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in operations]
    return kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
