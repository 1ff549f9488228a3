"""The adapters of a whole model: what ``LoRALinear4bit`` does for one layer, for all layers at once.

Everything is checked on all layers before the first one changes. A model of PEFT has methods of its own; these
functions are for layers that :func:`replace_linear` made, stacks of experts among them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from .adapter import AdapterSettings, check_adapter_name
from .experts import GroupedLinear4bit, no_dropout
from .named_adapters import NamedAdapters, adapted_layers
from .paths import some
from .targets import check_all_match, is_end, matches, read_parameters, read_patterns


@dataclasses.dataclass(frozen=True, repr=False)
class Adapter:
    """One adapter of a model: its layers by path, and A and B of each, which an optimizer takes."""

    layers: dict[str, NamedAdapters]
    parameters: list[nn.Parameter]

    def __repr__(self) -> str:
        elements = sum(parameter.numel() for parameter in self.parameters)
        return f"Adapter({len(self.layers)} layers, {elements} parameters)"


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Every adapter of ``model`` by name, in the order in which layers have them.

    Returns:
        Name -> :class:`Adapter`: ``layers`` by their paths in the model, without the names of wrappers such as
        ``torch.compile``'s; ``parameters``, which an optimizer takes: of each layer A ``[r, K]``, then B ``[N, r]``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no :class:`LoRALinear4bit`.

    >>> import torch, lowrank_kernels as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    >>> report = lk.replace_linear(model, r=8, adapter_name="policy", progress=False)
    >>> lk.adapters(model)
    {'policy': Adapter(2 layers, 1792 parameters)}
    >>> optimizer = torch.optim.AdamW(lk.adapters(model)["policy"].parameters, lr=1e-3)
    """
    found: dict[str, Adapter] = {}
    for path, layer in _layers(model).items():
        for name in layer.r:
            adapter = found.setdefault(name, Adapter({}, []))
            adapter.layers[path] = layer
            for module in layer.adapter_modules(name):
                adapter.parameters.extend(module.parameters())
    return found


def add_adapter(
    model: nn.Module,
    name: str,
    r: int = AdapterSettings.r,
    lora_alpha: float = AdapterSettings.lora_alpha,
    lora_dropout: float = AdapterSettings.lora_dropout,
    use_rslora: bool = AdapterSettings.use_rslora,
    init_lora_weights: bool | str = AdapterSettings.init_lora_weights,
    adapter_dtype: torch.dtype | None = AdapterSettings.adapter_dtype,
    target_modules: str | Iterable[str] = "all-linear",
    target_parameters: str | Iterable[str] | None = None,
) -> None:
    """Adds adapter ``name`` to the model's :class:`LoRALinear4bit` layers: each then can compute

    ``y = x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ + bias`` with A ``[r, K]``, B ``[N, r]`` and ``scaling = lora_alpha / r``,
    or ``lora_alpha / sqrt(r)`` for rsLoRA. It becomes active in layers where none is; otherwise by
    :func:`set_adapter`. Call again with other ``target_modules`` for another r in other layers.

    Args:
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype: see
            :meth:`LoRALinear4bit.add_adapter`.
        target_modules: which of these layers, by the rules of :func:`replace_linear`. Layers of other
            types get their first adapter there. [] with ``target_parameters``: none.
        target_parameters: which stacks of experts, by their paths or the ends of these, such as
            ``"experts.gate_up_proj"``: each expert of them gets an adapter of its own, as PEFT's
            ``target_parameters`` do. They have no dropout.

    Raises:
        ValueError, TypeError: naming the argument; also if a target matches no such layer, or a layer has the
            adapter already. The model is as it was.

    Source: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023).

    >>> import torch, lowrank_kernels as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    >>> report = lk.replace_linear(model, r=8, adapter_name="policy", progress=False)
    >>> lk.add_adapter(model, "critic", r=4, lora_alpha=8, target_modules=["2"])
    >>> list(lk.adapters(model)["critic"].layers), model[2].active_adapter
    (['2'], 'policy')
    """
    layers = _layers(model)
    linear = {p: l for p, l in layers.items() if not isinstance(l, GroupedLinear4bit)}
    stacks = {p: l for p, l in layers.items() if isinstance(l, GroupedLinear4bit)}
    names = read_parameters(target_parameters)
    check_all_match("target_parameters", names, stacks, "stack of experts", stacks)
    targeted = {p: l for p, l in stacks.items() if any(is_end(p, name) for name in names)}
    if not (targeted and not isinstance(target_modules, str) and not list(target_modules)):
        targeted |= _targeted(linear, target_modules)
    settings = AdapterSettings(
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype
    )
    check_adapter_name(name)
    if lora_dropout and any(isinstance(layer, GroupedLinear4bit) for layer in targeted.values()):
        raise ValueError(no_dropout(lora_dropout))
    if taken := [path for path, layer in targeted.items() if name in layer.r]:
        raise ValueError(f"name: expected a new adapter, got {name!r}, which {some(taken)} have")
    for layer in targeted.values():
        layer._add_adapter(name, settings)
    for layer in layers.values():
        if layer.active_adapter is None and not layer.merged:
            layer.set_adapter(name)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Removes adapter ``name`` from all layers; where it was active, none is then.

    Raises:
        ValueError: no layer has it.
        RuntimeError: it is merged.

    >>> import torch, lowrank_kernels as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    >>> report = lk.replace_linear(model, r=8, adapter_name="policy", progress=False)
    >>> lk.delete_adapter(model, "policy")
    >>> lk.adapters(model)
    {}
    """
    having = _having(_layers(model), name)
    _require_unmerged(
        "delete_adapter", {p: l for p, l in having.items() if l.active_adapter == name}
    )
    for layer in having.values():
        layer.delete_adapter(name)


def set_adapter(model: nn.Module, name: str) -> contextlib.AbstractContextManager:
    """Makes ``name`` the active adapter from now on; in a ``with``, until its end.

    Of all adapters only its parameters require gradients; layers that lack it are their base. It holds for the
    model, in all threads. The end of a ``with`` restores each layer's active adapter, and ``requires_grad`` as it
    was. Blocks may overlap in any order: the last one to end restores what was before the first.

    torch drops gradients for a parameter that requires none when backward runs, so run backward while the adapter
    that forward had is active. Under torch.utils.checkpoint, backward under another one raises RuntimeError.

    Which adapters require gradients is said by this function and by :meth:`AdapterBank.trainable`; the later
    call counts.

    Raises:
        ValueError: no layer has it.
        RuntimeError: an adapter is merged.

    >>> import torch, lowrank_kernels as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    >>> report = lk.replace_linear(model, r=8, adapter_name="policy", progress=False)
    >>> lk.add_adapter(model, "reference")
    >>> with lk.set_adapter(model, "reference"):
    ...     y = model(torch.zeros(1, 64))
    >>> model[0].active_adapter
    'policy'
    """
    layers = _layers(model)
    _having(layers, name)
    _require_unmerged("set_adapter", layers)
    until = _Until(layers)
    for layer in layers.values():
        layer.set_adapter(name)
    return until


class _State(NamedTuple):
    """A layer's active adapter, and which of its parameters require gradients."""

    active: str | None
    required: list[tuple[nn.Parameter, bool]]


class _Until(contextlib.AbstractContextManager):
    """Restores at its end what layers had before; where a later block has not ended, leaves that to it."""

    _entered: ClassVar[list[_Until]] = []

    def __init__(self, layers: dict[str, NamedAdapters]) -> None:
        self.layers = layers
        self.before = {
            layer: _State(
                layer.active_adapter,
                [
                    (p, p.requires_grad)
                    for own in layer.r
                    for module in layer.adapter_modules(own)
                    for p in module.parameters()
                ],
            )
            for layer in layers.values()
        }

    def __enter__(self) -> _Until:
        self._entered.append(self)
        return self

    def __exit__(self, *exception) -> None:
        later = self._entered[self._entered.index(self) + 1 :]
        self._entered.remove(self)
        restored = {}
        for layer, state in self.before.items():
            heir = next((block for block in later if layer in block.before), None)
            if heir is not None:
                heir.before[layer] = state
            else:
                restored[layer] = state
        _require_unmerged(
            "the end of set_adapter", {p: l for p, l in self.layers.items() if l in restored}
        )
        for layer, state in restored.items():
            layer._active_adapter = state.active
            for parameter, wanted in state.required:
                parameter.requires_grad_(wanted)


def disable_adapters(model: nn.Module) -> contextlib.AbstractContextManager:
    """The model is its base from now on, even while merged; in a ``with``, until its end.

    Also under :meth:`AdapterBank.using`: disabled layers are their base, ``y = x Wᵀ + bias``, for every row of a
    plan. Raises TypeError or ValueError for a model without :class:`LoRALinear4bit`.

    >>> import torch, lowrank_kernels as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    >>> report = lk.replace_linear(model, r=8, adapter_name="policy", progress=False)
    >>> x = torch.randn(3, 64)
    >>> with lk.disable_adapters(model):
    ...     base = model(x)
    >>> torch.equal(base, model(x))  # a new adapter has B = 0
    True
    """
    restore = contextlib.ExitStack()
    for layer in _layers(model).values():
        restore.enter_context(layer.disable_adapters())
    return restore


def enable_adapters(model: nn.Module) -> None:
    """Undoes :func:`disable_adapters`. Raises TypeError or ValueError for a model without such layers.

    >>> import torch, lowrank_kernels as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    >>> report = lk.replace_linear(model, r=8, adapter_name="policy", progress=False)
    >>> context = lk.disable_adapters(model)
    >>> lk.enable_adapters(model)
    """
    for layer in _layers(model).values():
        layer.enable_adapters()


def merge_adapter(model: nn.Module) -> None:
    """Folds the active adapter into the 4-bit weights: :meth:`LoRALinear4bit.merge` on all layers.

    Each W ``[N, K]`` becomes ``quantize(W + scaling · B A)`` with its own settings; the original bytes are kept
    aside. The merged model is near, not equal to, the unmerged one.

    Raises:
        RuntimeError: a layer is merged, is disabled, has no active adapter, or its A or B has hooks.
        ValueError: a merged weight is not finite; the message names the layer.

    After an error the model is as it was.

    >>> import torch, lowrank_kernels as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    >>> report = lk.replace_linear(model, r=8, adapter_name="policy", progress=False)
    >>> packed = model[0].weight.clone()
    >>> lk.merge_adapter(model)
    >>> model[0].merged
    True
    >>> lk.unmerge_adapter(model)
    >>> torch.equal(model[0].weight, packed)
    True
    """
    layers = _layers(model)
    _require_unmerged("merge_adapter", layers)
    merged: list[NamedAdapters] = []
    for path, layer in layers.items():
        try:
            layer.merge()
        except BaseException as error:
            for done in merged:
                done.unmerge()
            if type(error) in (RuntimeError, ValueError):
                raise type(error)(f"{path}: {error}") from error
            raise
        merged.append(layer)


def unmerge_adapter(model: nn.Module) -> None:
    """Restores the original bytes of every merged layer exactly. Raises RuntimeError if nothing is merged.

    >>> import torch, lowrank_kernels as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    >>> report = lk.replace_linear(model, r=8, adapter_name="policy", progress=False)
    >>> lk.merge_adapter(model)
    >>> lk.unmerge_adapter(model)
    >>> model[0].merged
    False
    """
    merged = [layer for layer in _layers(model).values() if layer.merged]
    if not merged:
        raise RuntimeError("unmerge_adapter: nothing is merged; call merge_adapter() first")
    for layer in merged:
        layer.unmerge()


# -- checks ----------------------------------------------------------------------------------------


def _layers(model: nn.Module) -> dict[str, NamedAdapters]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not (layers := adapted_layers(model)):
        raise ValueError(
            f"model: expected LoRALinear4bit layers or Experts4bit (see replace_linear), got a "
            f"{type(model).__name__} without any"
        )
    return layers


def _having(layers: dict[str, NamedAdapters], name: str) -> dict[str, NamedAdapters]:
    having = {path: layer for path, layer in layers.items() if name in layer.r}
    if not having:
        names = list(dict.fromkeys(n for layer in layers.values() for n in layer.r))
        raise ValueError(f"name: expected one of {names}, got {name!r}")
    return having


def _targeted(
    layers: dict[str, NamedAdapters], target_modules: str | Iterable[str]
) -> dict[str, NamedAdapters]:
    targets = read_patterns("target_modules", target_modules)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return layers
    patterns = [targets] if isinstance(targets, str) else [[target] for target in targets]
    for pattern in patterns:
        if not any(matches(path, pattern) for path in layers):
            got = pattern if isinstance(pattern, str) else pattern[0]
            raise ValueError(
                f"target_modules: {got!r} matches no LoRALinear4bit (see replace_linear); here are "
                f"{some(layers)}"
            )
    if not patterns:
        raise ValueError(f"target_modules: expected at least one name, got {target_modules!r}")
    return {p: l for p, l in layers.items() if any(matches(p, pattern) for pattern in patterns)}


def _require_unmerged(action: str, layers: dict[str, NamedAdapters]) -> None:
    if merged := [path for path, layer in layers.items() if layer.merged]:
        raise RuntimeError(f"{action}: {some(merged)}: merged; call unmerge_adapter() first")
