"""``replace_linear``: a model's linear layers become 4-bit layers with adapters, in place."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from tabulate import SEPARATING_LINE, tabulate
from torch import nn
from tqdm.auto import tqdm

from .adapter import AdapterSettings
from .dense_layers import (
    OF_THE_CODE,
    PART,
    DenseLayers,
    SkippedLayer,
    is_adapter_layer,
    stacks,
    warning_of_stacks,
)
from .experts import Experts4bit, no_dropout, stack_names
from .formats import quantize_4bit
from .named_adapters import NamedAdapters
from .nn import Linear4bit, LoRALinear4bit
from .schema import FLOAT_DTYPES
from .shared_input import share_known
from .targets import check_all_match, is_end, matches, read_parameters, read_patterns

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
_UNTARGETED, _ALREADY = "not in target_modules", "in 4 bits already"
DEFAULT_EXCLUDED = ("lm_head",)


@dataclasses.dataclass(frozen=True)
class ReplacedLayer:
    """One replaced layer, or stack of experts. Bytes: weight, statistics and bias, without the adapter's.

    ``shape``: [N, K], of a stack [E, N, K] as it lies.
    """

    name: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    adapter_bytes: int


@dataclasses.dataclass(frozen=True)
class ReplaceReport:
    """What :func:`replace_linear` did; ``str`` prints it as a table."""

    replaced: list[ReplacedLayer]
    skipped: list[SkippedLayer]
    # With fuse=True: the path of each module whose children share their input, and their names.
    fused: list[tuple[str, tuple[str, ...]]] = dataclasses.field(default_factory=list)

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
            rows.append(_row(layer.name, " x ".join(map(str, layer.shape)), layer))
        rows.append(_row("total", f"{len(self.replaced)} layers", self))
        rows.insert(-1, SEPARATING_LINE)
        look = {"disable_numparse": True, "stralign": "right", "colalign": ("left",)}
        lines = [tabulate(rows, headers="firstrow", **look)]
        if self.fused:
            lines += [
                "",
                f"fused: {len(self.fused)} groups, such as {self.fused[0][0]}: {', '.join(self.fused[0][1])}",
            ]
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
    exclude_modules: str | Iterable[str] | None = DEFAULT_EXCLUDED,
    r: int = AdapterSettings.r,
    lora_alpha: float = AdapterSettings.lora_alpha,
    lora_dropout: float = AdapterSettings.lora_dropout,
    use_rslora: bool = AdapterSettings.use_rslora,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    progress: bool = True,
    adapter_name: str = "default",
    init_lora_weights: bool | str = AdapterSettings.init_lora_weights,
    quant_storage: torch.dtype = torch.uint8,
    adapter_dtype: torch.dtype | None = AdapterSettings.adapter_dtype,
    fuse: bool = False,
    target_parameters: str | Iterable[str] | None = None,
) -> ReplaceReport:
    """Replaces linear layers by :class:`LoRALinear4bit`, or with r = 0 by :class:`Linear4bit`.

    The experts of mixtures whose weights transformers stacks in 3-D parameters (``use_experts_implementation``) become
    :class:`Experts4bit`, each stack a line of the report; routers stay dense.

    In place and layer by layer: the old weight is dropped before the next one is quantized, so the
    peak is the model and one layer. Device, bias, hooks and training mode stay. With r > 0 every
    parameter of the model but the adapters is frozen, as PEFT does; with r = 0 ``requires_grad``
    stays as it is elsewhere.

    Args:
        model: any module but an nn.Linear, which could not be replaced in place.
        target_modules: "all-linear"; or names, each matching the module path it equals or ends with
            (``"q_proj"`` matches ``"layers.0.q_proj"``); or a regular expression for the full path.
            These are PEFT's rules.
        exclude_modules: names or a regular expression, by the same rules; None excludes nothing. Each
            has to match a layer (but for the default, where the model may have no ``lm_head``); what is in
            a part of the model is excluded by an expression such as ``r"vision_tower\\..*"``.
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_name, adapter_dtype:
            see :meth:`LoRALinear4bit.add_adapter`.
        quant_type, blocksize, double_quant, quant_storage: see :func:`quantize_4bit`. Not used for
            a layer that is a :class:`Linear4bit` already: it gains an adapter and keeps its bytes.
        target_parameters: of the stacks of experts, those whose experts get adapters, each of its own: see
            :func:`add_adapter`. The other stacks are frozen.
        progress: show a progress bar.
        fuse: layers that read the same activations (queries, keys and values; gate and up) compute in one operator,
            see :func:`lora_linear_4bit_group`, in the models of transformers whose attention and MLP are known
            (Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3, Phi). The modules, their names and state dict stay; under
            torch.compile, which sees the calls one by one, nothing is fused. Elsewhere nothing changes, and a warning
            says so.

    Left alone, and listed in the report with the reason: layers that are not targeted or are
    excluded; layers whose weight another module shares (tied embeddings), is computed from other
    parameters (pruning, weight_norm), is read by the model's code instead of calling the layer (torch's
    encoder layers, Mamba's ``dt_proj``), is kept in float32 by the model (``wo`` of T5) or is offloaded;
    subclasses of nn.Linear, whose forward may differ; routers; and stacks of experts of other models. Of
    PEFT's LoRA layers r = 0 replaces the base; their adapters and copies of modules stay as they are.

    If all targeted layers have to stay dense because of the model's code, a warning says so, and the model
    is as it was. A warning says, too, if experts that stay dense outweigh what has been replaced.

    Raises:
        ValueError: a target or an exclusion matches nothing, nothing can be replaced, or an argument is
            out of range; the model is as it was. Also for a NaN or infinity in a weight: the message names
            the layer, and those before it are replaced.
        TypeError: model is no module or is an nn.Linear, or a targeted weight is not float32,
            bfloat16 or float16; the model is as it was.

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> report = lk.replace_linear(model, r=4, exclude_modules=["2"], progress=False)
        >>> [layer.name for layer in report.replaced], report.skipped
        (['0'], [SkippedLayer(name='2', reason='in exclude_modules')])
    """
    if not isinstance(model, nn.Module) or isinstance(model, nn.Linear):
        raise TypeError(
            "model: expected a torch.nn.Module that contains linear layers (for one layer use "
            f"LoRALinear4bit.from_linear), got {type(model).__name__}"
        )
    if type(fuse) is not bool:
        raise TypeError(f"fuse: expected True or False, got {fuse!r}")
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
    adapted = _adapted_stacks(model, groups, target_parameters, r, lora_dropout)
    if not groups:
        return _nothing_replaced(target_modules, skipped)

    replaced = []
    for names in tqdm(groups, desc="Quantizing", unit="layer", disable=not progress):
        if stack_names(model.get_submodule(names[0])):
            replaced += _replace_experts(model, names, quant, adapter, adapted)
        else:
            replaced.append(_replace_one(model, names, cls, arguments))
    if r > 0:
        layers = (m for m in model.modules() if isinstance(m, NamedAdapters))
        kept = {id(p) for m in layers for p in _adapter_parameters(m)}
        for parameter in model.parameters():
            if id(parameter) not in kept:
                parameter.requires_grad_(False)
    _tell_transformers(model)
    everything = isinstance(target_modules, str) and target_modules.lower() == "all-linear"
    message = warning_of_stacks(model, (layer.shape for layer in replaced))
    if everything and message:
        warnings.warn(message, stacklevel=2)
    fused = []
    if fuse:
        fused, why_not = share_known(model, lambda layer: isinstance(layer, Linear4bit))
        if not fused:
            warnings.warn(f"fuse: nothing was fused in this model: {why_not}", stacklevel=2)
    return ReplaceReport(replaced, skipped + stacks(model), fused)


def _nothing_replaced(target_modules, skipped: list[SkippedLayer]) -> ReplaceReport:
    """A warning where the model's code is why; else ValueError, since something else was meant."""
    skipped.sort(key=lambda layer: layer.reason == _UNTARGETED)
    reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in skipped[:5])
    if not any(layer.reason.startswith(OF_THE_CODE) for layer in skipped):
        raise ValueError(
            f"target_modules: expected a linear layer to replace, got {target_modules!r} on a "
            f"model with {reasons or 'no torch.nn.Linear'}"
        )
    warnings.warn(f"nothing was replaced: {reasons}", stacklevel=3)
    return ReplaceReport([], skipped)


def _tell_transformers(model: nn.Module) -> None:
    """As from_pretrained does with quantized models: some code of transformers then asks no weight for its dtype."""
    for module in model.modules():
        if hasattr(type(module), "_keep_in_fp32_modules") and hasattr(module, "config"):
            module.config._is_quantized = True


def _adapter_parameters(layer: NamedAdapters) -> Iterator[nn.Parameter]:
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
    wrapper = _wrapper(model, names[0])
    for hook in _HOOKS:  # the same dictionaries, so that the handles of the hooks still remove them
        setattr(new, hook, getattr(old, hook))
    move_accelerates_hook(old, new)
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    if wrapper is not None:
        adapter_layers.adopt(wrapper)
    adapter_bytes = 0
    if isinstance(new, LoRALinear4bit):
        adapter_bytes = sum(p.numel() * p.element_size() for p in _adapter_parameters(new))
    shape = (new.out_features, new.in_features)
    return ReplacedLayer(names[0], shape, before, _nbytes(new) - adapter_bytes, adapter_bytes)


def _adapted_stacks(model, groups, target_parameters, r: int, lora_dropout: float) -> set[str]:
    """The paths of the stacks whose experts get adapters."""
    wanted = read_parameters(target_parameters)
    experts = {name: model.get_submodule(name) for name, *_ in groups}
    stacks = {
        _path(name, key): (module, key)
        for name, module in experts.items()
        for key in stack_names(module)
    }
    check_all_match("target_parameters", wanted, stacks, "stack of experts", stacks)
    if wanted and r == 0:
        raise ValueError("target_parameters: expected r > 0 for adapters, got r = 0")
    if wanted and lora_dropout:
        raise ValueError(no_dropout(lora_dropout))
    adapted = {path for path in stacks if any(is_end(path, name) for name in wanted)}
    for path in adapted:
        module, key = stacks[path]
        if isinstance(module, Experts4bit) and module.stacks[key].r:
            raise ValueError(
                f"target_parameters: {path} has adapters already; add_adapter adds another"
            )
    return adapted


def _path(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _replace_experts(
    model: nn.Module, names: list[str], quant: dict, adapter: dict, adapted: set[str]
) -> list[ReplacedLayer]:
    """A line for each stack; what it weighs includes its bias."""
    experts = model.get_submodule(names[0])
    lines, before = [], {key: _stack_nbytes(experts, key) for key in stack_names(experts)}
    if not isinstance(experts, Experts4bit):  # which keeps its bytes
        experts = _quantize_experts(model, names, quant)
    for key, stack in experts.stacks.items():
        after, path = _stack_nbytes(experts, key), _path(names[0], key)
        if path in adapted:
            settings = {k: v for k, v in adapter.items() if k != "adapter_name"}
            stack.add_adapter(adapter["adapter_name"], **settings)
        elif adapter["r"] > 0 and not stack.r:
            stack.set_adapter(adapter["adapter_name"])
        size = sum(p.numel() * p.element_size() for p in _adapter_parameters(stack))
        shape = tuple(stack.weight4bit.shape)
        lines.append(ReplacedLayer(path, shape, before[key], after, size))
    return lines


def _quantize_experts(model: nn.Module, names: list[str], quant: dict) -> Experts4bit:
    """Each dense stack is dropped as soon as it is in 4 bits."""
    old, stacks = model.get_submodule(names[0]), {}
    keys = stack_names(old)
    try:
        for key in keys:  # nothing is dropped of experts that cannot be quantized
            if not _all_finite(old._parameters[key]):
                quantize_4bit(old._parameters[key], **quant)  # says where
    except ValueError as error:
        raise ValueError(f"{names[0]}: {error}") from error
    for key in keys:
        stacks[key] = quantize_4bit(old._parameters[key], **quant)
        del old._parameters[key]
    new = Experts4bit.from_weights(old, stacks)
    move_accelerates_hook(old, new)
    for name in names:
        model.set_submodule(name, new)
    return new


def _all_finite(parameter: nn.Parameter) -> bool:
    """Without a temporary of its size."""
    return parameter.is_meta or all(bool(x.isfinite()) for x in parameter.detach().aminmax())


def _stack_nbytes(experts: nn.Module, key: str) -> int:
    """Of a dense or 4-bit stack without its adapters, and of its bias."""
    stack = experts.stacks[key] if isinstance(experts, Experts4bit) else experts._parameters[key]
    bias = experts._parameters.get(f"{key}_bias")
    size = 0 if bias is None else bias.numel() * bias.element_size()
    if isinstance(stack, nn.Parameter):
        return size + stack.numel() * stack.element_size()
    adapters = sum(p.numel() * p.element_size() for p in _adapter_parameters(stack))
    return size + _nbytes(stack) - adapters


def move_accelerates_hook(old: nn.Module, new: nn.Module) -> None:
    """accelerate's hook, if ``old`` has one, becomes one of ``new``."""
    if (hook := getattr(old, "_hf_hook", None)) is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(old)
        add_hook_to_module(new, hook)


# -- which layers ----------------------------------------------------------------------------------


class _AdapterLayers(Protocol):
    """What replace_linear has to know of a library whose layers wrap others."""

    def why_not(self, layer: nn.Module) -> str | None:
        """Why the base of such a layer cannot become a Linear4bit; None if it can."""

    def adopt(self, layer: nn.Module) -> None:
        """Its base has become one."""


adapter_layers: _AdapterLayers | None = None  # interop puts PEFT's here


def _without_base(names: list[str]) -> list[str]:
    """``names``, and those of the wrapped layers: who writes "q_proj" means the base of its adapter."""
    plain = (name.replace(".base_layer", "").replace(".original_module", "") for name in names)
    return list(dict.fromkeys([*names, *plain]))


def _wrapper(model: nn.Module, name: str) -> nn.Module | None:
    """PEFT's layer around the layer ``name``, if it is the base of one."""
    parent, _, child = name.rpartition(".")
    found = model.get_submodule(parent)
    return found if child == "base_layer" and is_adapter_layer(found) else None


def _why_wrapped(wrapper: nn.Module, r: int) -> str | None:
    """Why the base of an adapter stays dense."""
    what = f"the base of PEFT's {type(wrapper).__name__}"
    if r > 0:
        return f"{what}, which has adapters already; r=0 replaces it"
    why = "PEFT is not registered" if adapter_layers is None else adapter_layers.why_not(wrapper)
    return why and f"{what}: {why}; call replace_linear before adapters are added"


def _unique_modules(model: nn.Module) -> tuple[dict[int, nn.Module], dict[int, list[str]]]:
    """The modules but for parts of LoRALinear4bit and Experts4bit, and all the names that each goes by."""
    modules: dict[int, nn.Module] = {}
    names_of: dict[int, list[str]] = {}
    inside: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in inside:
            continue
        modules[id(module)] = module
        names_of.setdefault(id(module), []).append(name)
        if isinstance(module, LoRALinear4bit):
            inside |= {id(part) for part in module.modules()} - {id(module)}
        if isinstance(module, Experts4bit):
            inside |= {id(part) for stack in module.stacks.values() for part in stack.modules()}
    return modules, names_of


def _plan(
    model: nn.Module, target_modules, exclude_modules, r: int
) -> tuple[list[list[str]], list[SkippedLayer]]:
    """The layers to replace, each as all the names it goes by, and those skipped."""
    targets = read_patterns("target_modules", target_modules)
    excluded = read_patterns("exclude_modules", () if exclude_modules is None else exclude_modules)
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    modules, names_of = _unique_modules(model)
    rule = DenseLayers(model)

    def is_target(module: nn.Module, names: list[str]) -> bool:
        if everything:
            return is_layer(module)
        return any(matches(name, targets) for name in names)

    named = {key: _without_base(names) for key, names in names_of.items()}
    for key, module in modules.items():  # who writes "experts.down_proj" means those experts
        named[key] += [_path(n, p) for n in named[key] for p in stack_names(module)]

    def is_layer(module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or bool(stack_names(module))

    linears = [n for key, m in modules.items() if is_layer(m) for n in named[key]]
    if not everything:
        every_name = [name for names in named.values() for name in names]
        check_all_match("target_modules", targets, every_name, "module", linears)
    targeted = [n for key, m in modules.items() if is_target(m, named[key]) for n in named[key]]
    silent = excluded if tuple(excluded) == DEFAULT_EXCLUDED else ()
    check_all_match("exclude_modules", excluded, [*linears, *targeted], "layer", silent=silent)

    groups, skipped = [], []
    for key, module in modules.items():
        names = names_of[key]
        known = named[key]
        experts = bool(stack_names(module))
        why = (rule.why_experts if experts else rule.why)(names[0], module)
        if why == PART:
            continue
        if not is_target(module, known):
            why = _UNTARGETED if is_layer(module) else ""
        elif any(matches(name, excluded) for name in known):
            why = "in exclude_modules"
        elif experts:
            if why is None and r == 0 and isinstance(module, Experts4bit):
                why = _ALREADY
        elif type(module) not in rule.linear and not (module._parameters or module._buffers):
            why = ""  # a container
        elif why is None and type(module) is Linear4bit and r == 0:
            why = _ALREADY
        elif why is None and (wrapper := _wrapper(model, names[0])) is not None:
            why = _why_wrapped(wrapper, r)
        if why:
            skipped.append(SkippedLayer(names[0], why))
        elif why is None:
            weight = module._parameters.get("weight")
            if type(module) is nn.Linear and weight.dtype not in FLOAT_DTYPES:
                raise TypeError(
                    f"{names[0]}.weight: expected float32, bfloat16 or float16, got {weight.dtype}"
                )
            groups.append(names)
    return groups, skipped
