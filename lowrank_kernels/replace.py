"""``replace_linear``: a model's linear layers become 4-bit layers with adapters, in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from tabulate import SEPARATING_LINE, tabulate
from torch import nn
from tqdm.auto import tqdm

from .nn import Linear4bit, LoRALinear4bit
from .schema import FLOAT_DTYPES
from .targets import matches, read_patterns

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_MIB = 2**20
_UNTARGETED = "not in target_modules"


@dataclasses.dataclass(frozen=True)
class ReplacedLayer:
    """One replaced layer. Bytes: weight, statistics and bias, without the adapter's."""

    name: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    adapter_bytes: int


@dataclasses.dataclass(frozen=True)
class SkippedLayer:
    """One layer left as it was, and why."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class ReplaceReport:
    """What :func:`replace_linear` did; ``str`` prints it as a table."""

    replaced: list[ReplacedLayer]
    skipped: list[SkippedLayer]

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.replaced)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.replaced)

    @property
    def adapter_bytes(self) -> int:
        return sum(layer.adapter_bytes for layer in self.replaced)

    def __str__(self) -> str:
        rows = [("replaced", "shape", "before MiB", "after MiB", "adapter MiB")]
        for layer in self.replaced:
            rows.append(_row(layer.name, f"{layer.shape[0]} x {layer.shape[1]}", layer))
        rows.append(_row("total", f"{len(self.replaced)} layers", self))
        rows.insert(-1, SEPARATING_LINE)
        look = {"disable_numparse": True, "stralign": "right", "colalign": ("left",)}
        lines = [tabulate(rows, headers="firstrow", **look)]
        if self.skipped:
            width = max(len(layer.name) for layer in self.skipped)
            lines += ["", f"skipped: {len(self.skipped)}"]
            lines += [f"{layer.name.ljust(width)}  {layer.reason}" for layer in self.skipped]
        return "\n".join(lines)


def _row(name: str, shape: str, sizes: ReplacedLayer | ReplaceReport) -> tuple[str, ...]:
    numbers = (sizes.bytes_before, sizes.bytes_after, sizes.adapter_bytes)
    return name, shape, *(f"{number / _MIB:.3f}" for number in numbers)


def replace_linear(
    model: nn.Module,
    target_modules: str | Iterable[str] = "all-linear",
    exclude_modules: str | Iterable[str] | None = ("lm_head",),
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    progress: bool = True,
    adapter_name: str = "default",
    init_lora_weights: bool | str = True,
    quant_storage: torch.dtype = torch.uint8,
    adapter_dtype: torch.dtype | None = None,
) -> ReplaceReport:
    """Replaces linear layers by :class:`LoRALinear4bit`, or with r = 0 by :class:`Linear4bit`.

    In place and layer by layer: the old weight is dropped before the next one is quantized, so the
    peak is the model and one layer. Device, bias, hooks and training mode stay. With r > 0 every
    parameter of the model but the adapters is frozen, as PEFT does; with r = 0 ``requires_grad``
    stays as it is elsewhere.

    Args:
        model: any module but an nn.Linear, which could not be replaced in place.
        target_modules: "all-linear"; or names, each matching the module path it equals or ends with
            (``"q_proj"`` matches ``"layers.0.q_proj"``); or a regular expression for the full path.
            These are PEFT's rules.
        exclude_modules: names or a regular expression, by the same rules; None excludes nothing.
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_name, adapter_dtype:
            see :meth:`LoRALinear4bit.add_adapter`.
        quant_type, blocksize, double_quant, quant_storage: see :func:`quantize_4bit`. Not used for
            a layer that is a :class:`Linear4bit` already: it gains an adapter and keeps its bytes.
        progress: show a progress bar.

    Left alone, and listed in the report with the reason: layers that are not targeted or are
    excluded, layers whose weight another module shares (tied embeddings), and subclasses of
    nn.Linear, whose forward may differ.

    Raises:
        ValueError: a target matches nothing, nothing can be replaced, or an argument is out of
            range; the model is as it was. Also for a NaN or infinity in a weight: the message names
            the layer, and those before it are replaced.
        TypeError: model is no module or is an nn.Linear, or a targeted weight is not float32,
            bfloat16 or float16; the model is as it was.
    """
    if not isinstance(model, nn.Module) or isinstance(model, nn.Linear):
        raise TypeError(
            "model: expected a torch.nn.Module that contains linear layers (for one layer use "
            f"LoRALinear4bit.from_linear), got {type(model).__name__}"
        )
    if type(r) is not int or r < 0:
        raise ValueError(f"r: expected an integer >= 0, got {r!r}")
    quant = {
        "quant_type": quant_type,
        "blocksize": blocksize,
        "double_quant": double_quant,
        "quant_storage": quant_storage,
    }
    adapter = {
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "use_rslora": use_rslora,
        "init_lora_weights": init_lora_weights,
        "adapter_name": adapter_name,
        "adapter_dtype": adapter_dtype,
    }
    cls, arguments = (LoRALinear4bit, quant | adapter) if r > 0 else (Linear4bit, quant)
    cls(1, 1, device="meta", **arguments)  # raises for a bad argument before anything changes
    groups, skipped = _plan(model, target_modules, exclude_modules, r)

    replaced = []
    for names in tqdm(groups, desc="Quantizing", unit="layer", disable=not progress):
        replaced.append(_replace_one(model, names, cls, arguments))
    if r > 0:
        kept = {id(p) for m in _lora_layers(model) for p in _adapter_parameters(m)}
        for parameter in model.parameters():
            if id(parameter) not in kept:
                parameter.requires_grad_(False)
    return ReplaceReport(replaced, skipped)


def _lora_layers(model: nn.Module) -> Iterator[LoRALinear4bit]:
    return (m for m in model.modules() if isinstance(m, LoRALinear4bit))


def _adapter_parameters(layer: LoRALinear4bit) -> Iterator[nn.Parameter]:
    yield from layer.lora_A.parameters()
    yield from layer.lora_B.parameters()


def _nbytes(module: nn.Module) -> int:
    tensors = (*module.parameters(), *module.buffers())
    return sum(t.numel() * t.element_size() for t in tensors)


def _replace_one(model: nn.Module, names: list[str], cls: type, arguments: dict) -> ReplacedLayer:
    old = model.get_submodule(names[0])
    before = _nbytes(old)
    try:
        new = cls.from_linear(old, **arguments)
    except ValueError as error:
        raise ValueError(f"{names[0]}: {error}") from error
    for hook in _HOOKS:  # the same dictionaries, so that the handles of the hooks still remove them
        setattr(new, hook, getattr(old, hook))
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    adapter_bytes = 0
    if isinstance(new, LoRALinear4bit):
        adapter_bytes = sum(p.numel() * p.element_size() for p in _adapter_parameters(new))
    shape = (new.out_features, new.in_features)
    return ReplacedLayer(names[0], shape, before, _nbytes(new) - adapter_bytes, adapter_bytes)


# -- which layers ----------------------------------------------------------------------------------


def _plan(
    model: nn.Module, target_modules, exclude_modules, r: int
) -> tuple[list[list[str]], list[SkippedLayer]]:
    """The layers to replace, each as all the names it goes by, and those skipped."""
    targets = read_patterns("target_modules", target_modules)
    excluded = read_patterns("exclude_modules", () if exclude_modules is None else exclude_modules)
    everything = isinstance(targets, str) and targets.lower() == "all-linear"

    names_of: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    owners: dict[int, list[str]] = {}
    inside: set[int] = set()  # parts of adapters, which are not targets themselves
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in inside:
            continue
        if id(module) not in modules:
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(id(parameter), []).append(name)
        names_of.setdefault(id(module), []).append(name)
        modules[id(module)] = module
        if isinstance(module, LoRALinear4bit):
            inside |= {id(part) for part in module.modules()} - {id(module)}

    def is_target(module: nn.Module, names: list[str]) -> bool:
        if everything:
            return isinstance(module, nn.Linear)
        return any(matches(name, targets) for name in names)

    _check_targets(modules, names_of, targets, everything)
    groups, skipped = [], []
    for key, module in modules.items():
        names = names_of[key]
        weight = module._parameters.get("weight")
        if not is_target(module, names):
            if isinstance(module, nn.Linear):
                skipped.append(SkippedLayer(names[0], _UNTARGETED))
        elif any(matches(name, excluded) for name in names):
            skipped.append(SkippedLayer(names[0], "in exclude_modules"))
        elif type(module) not in (nn.Linear, Linear4bit):
            if weight is not None:
                skipped.append(SkippedLayer(names[0], f"of type {type(module).__name__}"))
        elif type(module) is Linear4bit and r == 0:
            skipped.append(SkippedLayer(names[0], "in 4 bits already"))
        elif len(owners[id(weight)]) > 1:
            other = next(name for name in owners[id(weight)] if name != names[0])
            skipped.append(SkippedLayer(names[0], f"weight shared with {other}"))
        else:
            if type(module) is nn.Linear and weight.dtype not in FLOAT_DTYPES:
                raise TypeError(
                    f"{names[0]}.weight: expected float32, bfloat16 or float16, got {weight.dtype}"
                )
            groups.append(names)
    if not groups:
        skipped.sort(key=lambda layer: layer.reason == _UNTARGETED)
        reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in skipped[:5])
        raise ValueError(
            f"target_modules: expected a linear layer to replace, got {target_modules!r} on a "
            f"model with {reasons or 'no torch.nn.Linear'}"
        )
    return groups, skipped


def _check_targets(modules, names_of, targets: str | list[str], everything: bool) -> None:
    if everything:
        return
    every_name = [name for names in names_of.values() for name in names]
    for target in [targets] if isinstance(targets, str) else targets:
        pattern = target if isinstance(targets, str) else [target]
        if not any(matches(name, pattern) for name in every_name):
            linears = [names_of[k][0] for k, m in modules.items() if isinstance(m, nn.Linear)]
            raise ValueError(
                f"target_modules: {target!r} matches no module; linear layers here: "
                f"{', '.join(linears[:8]) or 'none'}{', ...' if len(linears) > 8 else ''}"
            )
