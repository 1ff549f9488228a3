"""Which linear layers have to stay dense, and why: one rule for replace_linear, LowRankConfig and ``quantize``.

It is what a layer is, not what a caller asks for: layers of another class or library, weights that others share or
that are computed from other parameters, weights that the model's code reads or wants in float32, parts of PEFT's
adapters, layers whose forward somebody replaced or whose weight is elsewhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from torch import nn

from .experts import count_of_experts, stack_names, stacked_parameters
from .linear4bit import Linear4bit
from .packed import Params4bit
from .schema import FLOAT_DTYPES
from .weight_reads import layers_read

_MIB = 2**20
COMPUTED = "its weight is computed from other parameters"
_READ, _FLOAT32 = "its weight is read by", "kept in float32 by the model"
_ROUTER = "a router, which chooses experts"
OF_THE_CODE = (_READ, _FLOAT32)  # reasons that begin so
PART = "a part of PEFT's adapter"  # of no interest in reports


@dataclasses.dataclass(frozen=True)
class SkippedLayer:
    """One layer left as it was, and why."""

    name: str
    reason: str


class DenseLayers:
    """The layers of ``model`` that have to stay dense: ``why(name, module)`` is the reason, or None.

    ``linear`` are the classes that can become 4-bit layers.
    """

    def __init__(self, model: nn.Module, linear: tuple[type, ...] = (nn.Linear, Linear4bit)):
        self.linear = linear
        self.readers = layers_read(model)
        self.float32 = _kept_in_float32(model)
        self.parts = dict(_parts_of_adapters(model))
        self.routers = set(_routers(model))
        self.owners: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.owners.setdefault(id(parameter), []).append(name)

    def why(self, name: str, module: nn.Module) -> str | None:
        """Why the layer ``name`` of the model stays dense; None if it need not."""
        if type(module) not in self.linear:
            return f"of type {_class_name(type(module))}"
        if name in self.parts:
            return self.parts[name]
        weight = module._parameters.get("weight")
        if weight is None:
            return COMPUTED
        if type(weight) not in (nn.Parameter, Params4bit):
            return f"its weight is a {_class_name(type(weight))}"
        others = [owner for owner in self.owners[id(weight)] if owner != name]
        if others:
            return f"weight shared with {others[0]}"
        if self.keeps_in_float32(f"{name}.weight"):
            return _FLOAT32
        if name in self.routers:
            return _ROUTER
        if name in self.readers:
            return f"{_READ} {self.readers[name]}"
        return _why_forward(module)

    def why_experts(self, name: str, experts: nn.Module) -> str | None:
        """Why the stacks of a transformers' module of experts stay dense; None if they need not."""
        for key in stacked_parameters(experts):
            parameter = experts._parameters[key]
            if type(parameter) is not nn.Parameter:
                return f"{key} is a {_class_name(type(parameter))}"
            if parameter.dtype not in FLOAT_DTYPES:
                return f"{key} is in {str(parameter.dtype).removeprefix('torch.')}"
            others = [owner for owner in self.owners[id(parameter)] if owner != name]
            if others:
                return f"{key} shared with {others[0]}"
            if self.keeps_in_float32(f"{name}.{key}"):
                return _FLOAT32
        if name.endswith("base_layer"):
            return "the base of an adapter; call replace_linear before adapters are added"
        return _why_forward(experts)

    def keeps_in_float32(self, parameter: str) -> bool:
        """Whether the model wants the parameter of that name in float32 in a model of 16 bits."""
        return any(
            parameter.startswith(prefix) and _has(parameter[len(prefix) :].split("."), entry)
            for prefix, entry in self.float32
        )


def _class_name(cls: type) -> str:
    """Its name; with that of its library if a class of ours or torch's has the same."""
    plain = cls.__name__ not in ("Linear", "Linear4bit", "LoRALinear4bit", "Parameter")
    package = cls.__module__.partition(".")[0]
    return (
        cls.__name__
        if plain or package in (__package__, "torch")
        else f"{package}'s {cls.__name__}"
    )


def _kept_in_float32(model: nn.Module) -> list[tuple[str, list[str]]]:
    """(prefix of a model of transformers in ``model``, parts of a name that it keeps in float32)."""
    found = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for field in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            entries = getattr(module, field, None)
            if isinstance(entries, (list, tuple, set, frozenset)):
                found += [(prefix, entry.split(".")) for entry in sorted(entries)]
    return found


def _has(parts: list[str], entry: list[str]) -> bool:
    """Whether the parts of ``entry`` follow each other in ``parts``; "*" stands for one."""
    return any(
        all(want in ("*", part) for part, want in zip(parts[i:], entry))
        for i in range(len(parts) - len(entry) + 1)
    )


def is_adapter_layer(module: nn.Module) -> bool:
    """Whether it is PEFT's wrapper around a layer."""
    return "base_layer" in module._modules and hasattr(module, "adapter_layer_names")


def _parts_of_adapters(model: nn.Module) -> Iterable[tuple[str, str]]:
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if is_adapter_layer(module):
            for part, _ in module.named_modules():
                if part and part.partition(".")[0] != "base_layer":
                    yield prefix + part, PART
            if getattr(module, "merged_adapters", None):
                yield f"{prefix}base_layer", f"{name} is merged; call unmerge_adapter() first"
        elif hasattr(module, "modules_to_save") and "original_module" in module._modules:
            for part, _ in module.named_modules():
                if part:
                    yield prefix + part, f"{name} is in modules_to_save, which trains a copy"


def _why_forward(module: nn.Module) -> str | None:
    hook = getattr(module, "_hf_hook", None)
    if hook is not None and _offloads(hook):
        return "offloaded by accelerate"
    # accelerate leaves the class's own forward there as it removes a hook.
    own = getattr(vars(module).get("forward"), "__func__", None) is type(module).forward
    if hook is None and "forward" in vars(module) and not own:
        return "its forward has been replaced"
    return None


def _offloads(hook) -> bool:
    inner = getattr(hook, "hooks", ())  # accelerate's SequentialHook
    return bool(getattr(hook, "offload", False)) or any(map(_offloads, inner))


def _routers(model: nn.Module) -> Iterable[str]:
    """Linear layers beside experts that have an output for each of them."""
    for name, module in model.named_modules():
        if not stack_names(module):
            continue
        count = count_of_experts(module)
        parent = name.rpartition(".")[0]
        prefix = f"{parent}." if parent else ""
        for path, layer in model.get_submodule(parent).named_modules():
            words = path.split(".")[-2:]
            named = any("router" in word or "gate" in word for word in words)
            if named and isinstance(layer, nn.Linear) and layer.out_features == count:
                yield prefix + path


# -- experts ---------------------------------------------------------------------------------------


def stacks(model: nn.Module) -> list[SkippedLayer]:
    """Parameters that are many matrices in one tensor: experts of mixtures, which stay dense, with their sizes."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.LayerNorm)):
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 3 and min(parameter.shape) > 1:
                count, *shape = parameter.shape
                what = (
                    f"{count} matrices of {shape[0]} x {shape[1]} in one parameter, as experts are"
                )
                size = parameter.numel() * parameter.element_size() / _MIB
                path = f"{name}.{key}" if name else key
                found.append(SkippedLayer(path, f"{what}: {size:.3f} MiB stay dense"))
    return found


def warning_of_stacks(model: nn.Module, quantized: Iterable[tuple[int, ...]]) -> str | None:
    """What to say if more of the model is in :func:`stacks` than in 4 bits; ``quantized`` are shapes."""
    names = [layer.name for layer in stacks(model)]
    dense = [model.get_parameter(name) for name in names]
    if sum(p.numel() for p in dense) <= sum(map(math.prod, quantized)):
        return None
    size = sum(p.numel() * p.element_size() for p in dense) / _MIB
    everything = sum(p.numel() * p.element_size() for p in model.parameters()) / _MIB
    return (
        f"most of this model stays dense: {len(names)} stacks of experts, {size:.1f} MiB of "
        f"{everything:.1f}, are no linear layers and are not quantized ({', '.join(names[:2])}"
        f"{', ...' if len(names) > 2 else ''})"
    )
