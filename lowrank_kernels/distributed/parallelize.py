"""``parallelize``: 4-bit layers of a model become this process's shards, in place."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from ..adapter_files import write_adapter
from ..experts import Experts4bit, GroupedLinear4bit
from ..frozen4bit import is_dtensor
from ..linear4bit import Linear4bit
from ..named_adapters import NamedAdapters, adapted_layers
from ..nn import LoRALinear4bit, take_adapters
from ..paths import named_modules
from ..targets import matches
from .experts import (
    DividedExperts4bit,
    ParallelExperts4bit,
    SlicedExperts4bit,
    become_parallel,
    rehearse,
)
from .layers import (
    ColumnParallelLoRALinear4bit,
    ParallelLoRALinear4bit,
    RowParallelLoRALinear4bit,
)
from .parts import Part
from .shards import Cut, Place


@dataclasses.dataclass(frozen=True)
class Column:
    """How to cut by outputs. ``unit``: parts are multiples of so many outputs, as of a head's."""

    gather_output: bool = False
    unit: int = 32


@dataclasses.dataclass(frozen=True)
class Row:
    """How to cut by inputs. ``unit``: parts are multiples of so many inputs, itself a multiple of 32."""

    input_is_parallel: bool = True
    unit: int = 32


@dataclasses.dataclass(frozen=True)
class Experts:
    """How to divide a module of experts: whole ones to each process, as equally as can be."""


@dataclasses.dataclass(frozen=True)
class Slices:
    """How to cut every expert of a module: by the features between its projections, in multiples of ``unit``."""

    unit: int = 32


Style = Column | Row | Experts | Slices
_STYLES = {"column": Column(), "row": Row(), "experts": Experts(), "slices": Slices()}


def parallelize(
    model: nn.Module, plan: Mapping[str, str | Style], group: object = None
) -> list[str]:
    """Cuts the 4-bit layers that ``plan`` names among the processes of ``group``; each keeps its part, in place.

    Call it on all processes, each with the whole model, adapters included: nothing is communicated. Weights are cut,
    never quantized again (:meth:`Weight4bit.narrow`), adapters as in S-LoRA, those of experts with their stacks. Hooks,
    training mode and ``requires_grad`` stay; parameters are new, so make the optimizer afterwards.

    Args:
        model: a module with :class:`Linear4bit`, :class:`LoRALinear4bit` and :class:`Experts4bit` inside; all others
            stay as they are.
        plan: ``{"q_proj": "column", "o_proj": "row", "mlp.experts": "experts"}``: a key matches the layers whose path
            it equals or ends with, as in :func:`replace_linear`; a value is "column", "row", :class:`Column` or
            :class:`Row` for a layer, "experts", "slices", :class:`Experts` or :class:`Slices` for a module of experts.
            A dimension is cut into multiples of ``unit`` (32), larger parts first, so that the outputs of one layer fit
            the inputs of the next. Give head_dim (times the heads of a group) where heads must stay whole.
        group: a ProcessGroup, a DeviceMesh of one dimension, or None for the default group.

    Returns:
        The paths of the layers that were cut.

    Raises:
        ValueError, TypeError, RuntimeError: a key matches no layer or two keys one, a layer is no 4-bit layer, is
            cut already or has an adapter merged, a unit does not fit a weight, no process group; the model is as
            it was.
    """
    place = Place.of(group)
    layers = _layers(model, plan)
    cuts = {
        path: _check_layer(path, layer, style, place) for path, (layer, style) in layers.items()
    }
    for path, (layer, style) in layers.items():
        layer.__dict__.pop("forward", None)  # bound to the class that was, see _check_layer
        if isinstance(style, Experts | Slices):
            kind = DividedExperts4bit if isinstance(style, Experts) else SlicedExperts4bit
            become_parallel(layer, kind, cuts[path], place)
            continue
        take_adapters(layer)
        column = isinstance(style, Column)
        layer.__class__ = ColumnParallelLoRALinear4bit if column else RowParallelLoRALinear4bit
        option = style.gather_output if column else style.input_is_parallel
        layer._become_shard(place, style.unit, option)
    return list(layers)


def _layers(model: nn.Module, plan: Mapping) -> dict[str, tuple[nn.Module, Style]]:
    """Path -> layer and style, checked against the plan alone."""
    if not isinstance(plan, Mapping) or not plan:
        raise TypeError(f'plan: expected a mapping as {{"q_proj": "column"}}, got {plan!r}')
    found: dict[str, tuple[nn.Module, Style]] = {}
    key_of: dict[str, str] = {}
    # Of a wrapper and what it wraps, the latter. Stacks are cut by the module that has them.
    modules = {
        path: module
        for path, module in named_modules(model)
        if not isinstance(module, GroupedLinear4bit)
    }
    of_peft = {path for path, module in named_modules(model) if _is_of_peft(module)}
    for key, value in plan.items():
        style = _STYLES.get(value) if isinstance(value, str) else value
        if not isinstance(style, Style):
            raise ValueError(
                f"plan[{key!r}]: expected 'column', 'row', 'experts', 'slices', Column, Row, Experts or Slices, got "
                f"{value!r}"
            )
        unit = getattr(style, "unit", 1)
        if type(unit) is not int or unit < 1:
            raise ValueError(f"plan[{key!r}]: unit: expected an integer >= 1, got {unit!r}")
        paths = [path for path in modules if matches(path, [key])]
        if not paths:
            raise ValueError(
                f"plan: {key!r} matches no module of the model (experts are cut by the module that has the stacks)"
            )
        for path in paths:
            if path in found:
                raise ValueError(f"plan: {path} matches both {key_of[path]!r} and {key!r}")
            if path in of_peft:
                raise TypeError(
                    f"{path}: expected a layer without PEFT's adapters, which are not cut; use replace_linear's or "
                    "add_adapter"
                )
            found[path], key_of[path] = (modules[path], style), key
    return found


def _is_of_peft(module: nn.Module) -> bool:
    return any(cls.__name__ == "BaseTunerLayer" for cls in type(module).__mro__)


def _check_layer(path: str, layer: nn.Module, style: Style, place: Place) -> Cut:
    """How the layer is cut. Raises what would come in the middle of the work."""
    if isinstance(layer, ParallelLoRALinear4bit | ParallelExperts4bit):
        raise RuntimeError(f"{path}: expected a whole layer, got one that is cut already")
    of_experts = isinstance(style, Experts | Slices)
    if of_experts and not isinstance(layer, Experts4bit):
        raise TypeError(
            f"{path}: expected an Experts4bit (see replace_linear) for {style}, got {type(layer).__name__}"
        )
    if not of_experts and type(layer) not in (Linear4bit, LoRALinear4bit):
        raise TypeError(
            f"{path}: expected a Linear4bit or LoRALinear4bit (see replace_linear) for {style}, got "
            f"{type(layer).__name__}"
        )
    forward = layer.__dict__.get("forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(layer).forward:
        raise RuntimeError(
            f"{path}: expected the forward of its class, got one that somebody put in its place (accelerate's hooks, "
            "transformers' distributed_config); parallelize before"
        )
    for weighted in layer.stacks.values() if of_experts else (layer,):
        if is_dtensor(weighted.weight):
            raise RuntimeError(
                f"{path}: expected a whole weight, got FSDP2's; parallelize before fully_shard"
            )
        if weighted.merged:
            raise RuntimeError(f"{path}: an adapter is merged; call unmerge() before parallelize")
    try:
        if of_experts:
            return rehearse(layer, place, getattr(style, "unit", None))
        dim, meta = 0 if isinstance(style, Column) else 1, layer.weight4bit.to("meta")
        cut = place.cut(meta.shape[dim], style.unit)
        for rank, size in enumerate(cut.sizes):
            meta.narrow(dim, sum(cut.sizes[:rank]), size)
        return cut
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def save_adapter(model: nn.Module, path: str | os.PathLike, name: str = "default") -> None:
    """:func:`lowrank_kernels.save_adapter` of a model whose adapters are in parts: tensor parallel, or FSDP2's.

    Call it on all processes: it gathers A and B, the first process of the default group writes PEFT's files, and it
    returns when they are there. ``lowrank_kernels.load_adapter`` reads them: on all processes, into parallel
    layers too; before ``fully_shard``.
    """
    layers = [layer for layer in adapted_layers(model).values() if name in layer.r]
    whole = {layer: _gathered(layer, name) for layer in layers}
    try:
        if dist.get_rank() == 0:
            write_adapter(model, path, name, whole.__getitem__)
    finally:  # an error of the first process does not keep the others waiting
        dist.barrier()


def _gathered(layer: NamedAdapters, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(layer, Part):
        return layer.gather_adapter(name)
    A, B = layer.adapter_parameters(name)
    return (A.full_tensor(), B.full_tensor()) if is_dtensor(A) else (A, B)


def clip_grad_norm_(model: nn.Module, max_norm: float) -> torch.Tensor:
    """``torch.nn.utils.clip_grad_norm_`` of a model with parallel layers: by the norm over all their parts.

    Call it on all processes; what they all have is counted once. Returns the norm before, float32, that one process
    would find.
    """
    layers = [
        m for m in model.modules() if isinstance(m, ParallelLoRALinear4bit | ParallelExperts4bit)
    ]
    if not layers:
        raise ValueError("model: expected a model with parallel layers (see parallelize)")
    parts = {parameter for layer in layers for parameter in layer.parts()}
    with_gradient = [p for p in model.parameters() if p.grad is not None]
    # Squares of parts, and of what all processes have.
    square = torch.zeros(2, device=next(layers[0].parameters()).device)
    for parameter in with_gradient:
        square[int(parameter not in parts)] += parameter.grad.float().square().sum()
    norm = (layers[0].place.all_reduce(square[:1]) + square[1:]).sqrt()[0]
    torch.nn.utils.clip_grads_with_norm_(with_gradient, max_norm, norm)
    return norm
