"""Which tensors of a checkpoint are weights of linear layers that bitsandbytes' loader would make 4-bit ones."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..dense_layers import DenseLayers, SkippedLayer
from ..replace import DEFAULT_EXCLUDED
from ..schema import FLOAT_DTYPES
from ..targets import check_all_match, matches
from . import UserError, models, stacks
from .checkpoint import Entry, Source

_COUNTS = re.compile(r"(layers?|blocks?|experts?|stages?|heads?|labels?|groups?|depths?|states?)$")
_UNTARGETED, _EXCLUDED = _ASKED = ("not in --target-modules", "in --exclude")


@dataclasses.dataclass
class Plan:
    """``quantized``: key of a weight -> name of its layer; ``skipped``: linear layers left as they are, and why.

    ``stacks``: key of a tensor -> the stack of experts that it is a part of.

    ``dense``: the names that keep transformers from making them 4-bit; ``uncast``: keys that stay float32.
    """

    quantized: dict[str, str]
    skipped: list[SkippedLayer]
    dense: list[str]
    uncast: set[str]
    stacks: dict[str, stacks.Stack] = dataclasses.field(default_factory=dict)
    warning: str | None = None


def meta_model(source: Source) -> nn.Module:
    """The model of config.json on the meta device: no memory, no code but that of transformers."""
    models.require("transformers")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    path = source.folder / "config.json"
    _check_numbers(source.config, path)
    hook = register_module_module_registration_hook(_limited(source, path))
    try:
        config = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        config._attn_implementation = "eager"  # it can name code on the hub
        names = source.config.get("architectures") or [None]
        cls = getattr(transformers, names[0], None) if isinstance(names[0], str) else None
        with torch.device("meta"):
            if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
                model = cls(config)
            elif names[0] is None:
                model = transformers.AutoModel.from_config(config, trust_remote_code=False)
            else:
                raise UserError(
                    f"{path}: transformers has no model {names[0]!r}; code is never run"
                )
        model.tie_weights()
    except UserError:
        raise
    except Exception as error:  # of a configuration that anyone may have written
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path}: transformers cannot build this model: {lines[0]}") from None
    finally:
        hook.remove()
    return model


def _check_numbers(value: object, path: pathlib.Path, key: str = "") -> None:
    """Refuses counts that no model has: transformers would go through them one by one."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_numbers(inner, path, name)
    elif isinstance(value, list):
        for inner in value:
            _check_numbers(inner, path, key)
    elif isinstance(value, int):
        limit = 10**6 if _COUNTS.search(key) else 2**53
        if abs(value) > limit:
            raise UserError(f"{path}: {key}: expected at most {limit}, got {value}")


def _limited(source: Source, path: pathlib.Path) -> Callable:
    """A hook for each module that is made: the model may not have many more of them than the files have tensors."""
    left = [50 * len(source.entries) + 10_000]

    def count(module, name, submodule):
        left[0] -= 1
        if left[0] < 0:
            raise UserError(
                f"{path}: describes a far larger model than the {len(source.entries)} tensors are of"
            )

    return count


def _parameters(model: nn.Module, keys: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """(parameter -> the key that is loaded into it as it is, other keys -> what they are renamed to).

    As transformers loads a checkpoint: renamed keys, with the model's prefix or without. A key is in
    the first only if its statistics (key + ".absmax") will find the same parameter.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    there = model.state_dict()
    # Of a name with a suffix, whether the model's prefix is due is decided by the parameter.
    stats = there | {f"{name}.absmax": tensor for name, tensor in there.items()}
    prefix = model.base_model_prefix

    plain, converted = {}, {}
    for key in keys:
        name, converter = rename_source_key(key, renamings, converters, prefix, there)
        # Renamed for nothing; statistics have no such way out.
        if name not in there and key in there:
            name, converter = rename_source_key(key, [], [], prefix, there)
        of_stats, _ = rename_source_key(f"{key}.absmax", renamings, converters, prefix, stats)
        if converter is None and name in there and of_stats == f"{name}.absmax":
            plain[name] = key
        else:
            converted[key] = name
    return plain, converted


def _kept_in_float32(model: nn.Module) -> list[str]:
    return sorted(
        {
            name
            for field in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
            for name in getattr(model, field, None) or ()
        }
    )


@dataclasses.dataclass
class _Reasons:
    """Why layers and experts stay dense; None for those that need not."""

    model: nn.Module
    entries: Mapping[str, Entry]
    plain: Mapping[str, str]
    converted: Mapping[str, str]
    targets: str | list[str] | None
    excluded: list[str]

    def __post_init__(self):
        self.rule = DenseLayers(self.model, (nn.Linear,))

    def _asked(self, *names: str) -> str | None:
        if self.targets is not None and not any(matches(name, self.targets) for name in names):
            return _UNTARGETED
        return _EXCLUDED if any(matches(name, self.excluded) for name in names) else None

    def layer(self, name: str, module: nn.Module) -> str | None:
        weight = f"{name}.weight"
        if type(module) is not nn.Linear:
            return f"of type {type(module).__name__}"
        if (why := self._asked(name) or self.rule.why(name, module)) is not None:
            return why
        if weight not in self.plain:
            return stacks.CONVERTED if weight in self.converted.values() else stacks.MISSING
        dtype = self.entries[self.plain[weight]].dtype
        return None if dtype in FLOAT_DTYPES else stacks.stored_as(dtype)

    def experts(self, path: str, found: dict[str, stacks.Stack | str]) -> str | None:
        why = self._asked(path, *found)
        why = why or self.rule.why_experts(path, self.model.get_submodule(path))
        return why or next((w for w in found.values() if isinstance(w, str)), None)


def plan(
    model: nn.Module,
    entries: Mapping[str, Entry],
    targets: str | list[str] | None,
    excluded: list[str],
) -> Plan:
    """What :func:`quantize <.quantize.run>` does with each linear layer, and with experts. ``targets`` None: all.

    Raises UserError if the tensors are not those of the model, a target matches nothing, or nothing is left.
    """
    from transformers.pytorch_utils import Conv1D

    plain, converted = _parameters(model, entries)
    sizes = model.state_dict(keep_vars=True)
    for name, key in plain.items():
        if tuple(sizes[name].shape) != entries[key].shape:
            raise UserError(
                f"{key}: expected shape {tuple(sizes[name].shape)} by config.json, got {entries[key].shape}"
            )
    experts = stacks.find(model, entries, plain, converted)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    known = [*layers, *experts, *(name for found in experts.values() for name in found)]
    try:
        check_all_match("--target-modules", targets or [], known, "linear layer")
        silent = excluded if tuple(excluded) == DEFAULT_EXCLUDED else ()
        check_all_match("--exclude", excluded, known, "linear layer", silent=silent)
    except ValueError as error:
        raise UserError(str(error)) from None

    why = _Reasons(model, entries, plain, converted, targets, excluded)
    reasons = {name: why.layer(name, module) for name, module in layers.items()}
    reasons |= {path: why.experts(path, found) for path, found in experts.items()}
    _heed_loader(reasons, _kept_in_float32(model))
    quantized = {plain[f"{n}.weight"]: n for n in layers if reasons[n] is None}
    taken = stacks.by_key(found for path, found in experts.items() if reasons[path] is None)
    asked = stacks.by_key(found for path, found in experts.items() if reasons[path] in _ASKED)
    others = [  # experts that someone wants dense are named by their module
        (key, reason)
        for key, reason in _other_tensors(entries, plain, converted, layers)
        if key not in taken and key not in asked
    ]
    skipped = [SkippedLayer(name, reason) for name, reason in reasons.items() if reason]
    skipped += [SkippedLayer(key.removesuffix(".weight"), reason) for key, reason in others]
    if not quantized and not taken:
        few = "; ".join(f"{layer.name}: {layer.reason}" for layer in skipped[:5])
        raise UserError(f"nothing to quantize: {few or 'the model has no linear layer'}")
    uncast = {key for name, key in plain.items() if why.rule.keeps_in_float32(name)}
    warning = _warning(entries, [*quantized, *taken], [key for key, _ in others])
    return Plan(quantized, skipped, _patterns(reasons), uncast, taken, warning)


def _warning(
    entries: Mapping[str, Entry], quantized: Iterable[str], others: list[str]
) -> str | None:
    """What to say where most of the model stays dense for other reasons than that someone asked for it."""
    dense = sum(entries[key].nbytes for key in others)
    if dense <= sum(entries[key].nbytes for key in quantized):
        return None
    whole = sum(entry.nbytes for entry in entries.values())
    return (
        f"most of this model stays dense: {len(others)} tensors, {dense / 2**20:.1f} MiB of {whole / 2**20:.1f}, "
        f"are no linear layers as they are loaded, as experts of mixtures ({others[0]}, ...)"
    )


def _other_tensors(
    entries: Mapping[str, Entry],
    plain: Mapping[str, str],
    converted: Mapping[str, str],
    layers: Mapping[str, nn.Module],
) -> Iterator[tuple[str, str]]:
    """(key, why it stays dense) of matrices, and stacks of them, that are no linear layer: experts, above all."""
    for key, name in converted.items():
        module = name.removesuffix(".weight")
        if len(entries[key].shape) >= 2 and module not in layers:
            yield key, stacks.CONVERTED
    for key in plain.values():
        if len(entries[key].shape) > 2:
            yield key, "not a matrix"


def _patterns(reasons: dict[str, str | None]) -> list[str]:
    """The dense layers as transformers' loader should read them: some versions match any beginning of a name."""
    quantized = [name for name, why in reasons.items() if why is None]
    return [
        f"{name}$" if any(other.startswith(name) for other in quantized) else name
        for name, why in reasons.items()
        if why is not None
    ]


def _heed_loader(reasons: dict[str, str | None], fp32: list[str]) -> None:
    """Leaves dense what transformers takes for one of the dense layers: it matches endings, too."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    while True:
        dense = _patterns(reasons)
        caught = [
            name
            for name, why in reasons.items()
            if why is None and not should_convert_module(name, dense + fp32)
        ]
        if not caught:
            return
        for name in caught:
            reasons[name] = "its name is like that of a layer which stays dense"
