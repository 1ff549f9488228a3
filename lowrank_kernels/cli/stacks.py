"""Which tensors of a checkpoint are the experts of a mixture, and how they become stacks in 4 bits.

transformers keeps the weights of all experts of a layer in 3-D parameters. Checkpoints have them so, or a matrix for
each expert and projection, which transformers merges as it loads them; here that happens expert by expert, on the way
to 4 bits.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

from ..experts import stacked_parameters
from ..schema import FLOAT_DTYPES
from . import UserError
from .checkpoint import Entry, Source

CONVERTED = "converted when it is loaded"
MISSING = "not in the checkpoint"


@dataclasses.dataclass(frozen=True)
class Stack:
    """``key``: its name in the result; ``entries``: all that it is made of, expert by expert.

    ``convert``: what ``each`` entries of an expert in turn become one matrix by; None for a stack as it is.
    """

    name: str
    key: str
    shape: tuple[int, int, int]
    entries: list[Entry]
    each: int = 1
    convert: Callable[[list[torch.Tensor]], torch.Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    def pieces(self, source: Source, dtype: torch.dtype, progress: Callable) -> Iterator:
        """Its experts, each a matrix in ``dtype``; no more than one of them is read at a time."""
        if len(self.entries) == 1:
            (entry,) = self.entries
            for matrix in source.matrices(entry):
                yield (self.convert([matrix]) if self.convert else matrix).to(dtype)
                progress(entry.nbytes // self.shape[0])
            return
        parts = []
        for entry, tensor in source.tensors(self.entries):
            parts.append(tensor.to(dtype))
            progress(entry.nbytes)
            if len(parts) == self.each:
                yield self.convert(parts)
                parts = []


def find(
    model: nn.Module,
    entries: Mapping[str, Entry],
    plain: Mapping[str, str],
    converted: Mapping[str, str],
) -> dict[str, dict[str, Stack | str]]:
    """Of each module of experts its stacks by the names of the parameters; a string says why it cannot be one."""
    sources: dict[str, list[str]] = {}
    for key, name in converted.items():
        sources.setdefault(name, []).append(key)
    loading = _Loading(model)
    return {
        path: {
            name: _stack(name, model.get_parameter(name), entries, plain, sources, loading)
            for name in (f"{path}.{key}" for key in keys)
        }
        for path, module in model.named_modules()
        if (keys := stacked_parameters(module))
    }


def _stack(name, parameter, entries, plain, sources, loading) -> Stack | str:
    shape = tuple(parameter.shape)
    if name in plain:
        entry = entries[plain[name]]
        return _of_dtype(Stack(name, plain[name], shape, [entry]))
    if name not in sources:
        return MISSING
    merge = loading.merging(name, sources[name])
    if merge is None:
        return CONVERTED
    patterns, convert = merge
    columns = [sorted(keys, key=_in_order) for keys in patterns]
    if len({len(keys) for keys in columns}) != 1:
        raise UserError(
            f"{name}: expected as many tensors of each kind, got {list(map(len, columns))}"
        )
    parts = [entries[key] for row in zip(*columns) for key in row]
    stack = Stack(name, name, shape, parts, len(columns), convert)
    _check_shapes(stack)
    return _of_dtype(stack)


def _of_dtype(stack: Stack) -> Stack | str:
    dtypes = {entry.dtype for entry in stack.entries}
    if len(dtypes) > 1:
        return "stored in several dtypes"
    (dtype,) = dtypes
    return stack if dtype in FLOAT_DTYPES else stored_as(dtype)


def stored_as(dtype: torch.dtype) -> str:
    return f"stored as {str(dtype).removeprefix('torch.')}"


def by_key(modules: Iterable[dict[str, Stack | str]]) -> dict[str, Stack]:
    """The stacks by the keys of all that they are made of."""
    found = [stack for each in modules for stack in each.values() if isinstance(stack, Stack)]
    return {entry.key: stack for stack in found for entry in stack.entries}


def _check_shapes(stack: Stack) -> None:
    """That every expert is there, and of the shape that config.json says."""
    E, *matrix = stack.shape
    if len(stack.entries) == 1:
        count, *shape = stack.entries[0].shape
        shapes = [[torch.Size(shape)]] * count if len(shape) == 2 else []
    else:
        shapes = [e.shape for e in stack.entries]
        shapes = [shapes[i : i + stack.each] for i in range(0, len(shapes), stack.each)]
    if len(shapes) != E:
        raise UserError(
            f"{stack.entries[0].key}: expected {E} experts by config.json, got {len(shapes)}"
        )
    for number, parts in enumerate(shapes):
        try:
            found = tuple(stack.convert([torch.empty(s, device="meta") for s in parts]).shape)
        except RuntimeError:  # that cannot be joined
            found = None
        if found != tuple(matrix):
            key = stack.entries[min(number * stack.each, len(stack.entries) - 1)].key
            raise UserError(
                f"{key}: expected an expert of shape {tuple(matrix)} by config.json, got {found or parts}"
            )


def _in_order(key: str) -> list:
    return [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", key)]


class _Loading:
    """What transformers would do to tensors of the experts as it loads them."""

    def __init__(self, model: nn.Module):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(model)
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, WeightConverter)]

    def merging(self, name: str, keys: list[str]):
        """(the keys of each pattern, what makes one matrix of one key of each); None where that is not known.

        None, too, where a stack under its own name would not be read as that.
        """
        from transformers.core_model_loading import rename_source_key

        if rename_source_key(f"{name}.absmax", self.renamings, self.converters) != (
            f"{name}.absmax",
            None,
        ):
            return None
        found: dict[str, list[str]] = {}
        for key in keys:
            pattern = rename_source_key(key, self.renamings, self.converters)[1]
            found.setdefault(pattern, []).append(key)
        if None in found:
            return None
        converter = next(c for c in self.converters if set(found) <= set(c.source_patterns))
        if len(converter.target_patterns) != 1 or set(found) != set(converter.source_patterns):
            return None
        ops = [_of_one_expert(op) for op in converter.operations]
        if None in ops or (len(keys) == 1 and len(found) > 1):
            return None
        targets = list(converter.target_patterns)
        patterns = list(converter.source_patterns)

        def convert(parts: list[torch.Tensor]) -> torch.Tensor:
            merges = any(type(op).__name__ == "MergeModulelist" for op in ops)
            tensors = {p: [t] if merges else t[None] for p, t in zip(patterns, parts)}
            for op in ops:
                tensors = op.convert(tensors, source_patterns=patterns, target_patterns=targets)
            (stack,) = tensors.values()
            return stack[0]

        return [found[pattern] for pattern in patterns], convert


def _of_one_expert(op):
    """``op`` if it does to each expert of a stack the same as to the stack; None if that is not known."""
    name = type(op).__name__
    if name == "MergeModulelist":
        return op if op.dim == 0 else None
    if name in ("Concatenate", "Interleave"):
        return op if op.dim in (1, 2) else None
    if name == "Transpose" and {op.dim0, op.dim1} == {1, 2} and not op.check_dims:
        return copy.copy(op)
    return None
