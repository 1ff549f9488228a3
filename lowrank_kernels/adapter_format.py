"""PEFT's format of adapter files: what a folder or a state dict holds, checked before anything is built.

Layer ``<path>`` of the model is saved as ``base_model.model.<path>.lora_A.weight [r, K]`` and
``base_model.model.<path>.lora_B.weight [N, r]``. The configuration gives r and lora_alpha, and for
single layers, by regular expressions, ``rank_pattern`` and ``alpha_pattern``.

A head that was trained whole beside the adapter, as PEFT does for classifiers and reward models, is saved as
``base_model.model.<path>``, its parameters, where ``modules_to_save`` names it.

Stacks of experts that ``target_parameters`` names are saved under the path of their module, A ``[r E, K]`` and B
``[N, r E]``: the last one of a module as it is, and each one before with one more ``.base_layer`` behind the path.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .adapter import AdapterLayer
from .experts import GroupedLinear4bit, no_dropout
from .named_adapters import NamedAdapters
from .nn import PREFIX
from .paths import named_modules, without_marks
from .schema import FLOAT_DTYPES
from .targets import BoundedPatterns, is_end

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_KEY = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")
_MAX_CONFIG_BYTES = 2**24
# PEFT's init_lora_weights. The others change the base weight, which a 4-bit base cannot follow.
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# The names that PEFT gives heads of classifiers and reward models, whose modules it saves whole.
HEADS = ("classifier", "score")
_OF_WRAPPERS = ("modules_to_save", "original_module", "base_layer")  # none of a file's own names
# safetensors' names of the dtypes that an adapter may have.
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# What a key that is none of an adapter's two matrices stands for: a part of it, and words.
_OTHER_KEYS = (
    (".lora_A.bias", "a trained bias of an adapter (lora_bias)"),
    (".lora_B.bias", "a trained bias of an adapter (lora_bias)"),
    (".lora_embedding_", "an adapter of an embedding"),
    (".lora_magnitude_vector", "DoRA"),
    (".trainable_tokens_", "trained tokens of an embedding (trainable_token_indices)"),
    (".modules_to_save.", "a module that was trained whole (modules_to_save)"),
    (".weight", "a module that was saved whole (modules_to_save, or save_embedding_layers)"),
    (".bias", "a trained bias of the model, or a module that was saved whole"),
)


class ReadAdapter(NamedTuple):
    """``layers``: the adapter by layer. ``heads``: parameters of heads by their paths, such as ``score.weight``."""

    layers: dict[str, AdapterLayer]
    heads: dict[str, torch.Tensor]


def read_adapter(
    layers: Mapping[str, NamedAdapters], path: str | os.PathLike, model: nn.Module | None = None
) -> ReadAdapter:
    """The adapter in folder ``path``, all of it checked; ``model``, if given, for better messages.

    Every key, shape and dtype is compared with the layers before the first tensor is read.
    Raises what :func:`load_adapter` raises for a file.
    """
    folder = Path(path)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"path: expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE} "
                f"(pickled weights are not read), got {str(folder)!r} without {file}"
            )
    config = _read_config(folder / CONFIG_FILE)
    file = folder / WEIGHTS_FILE
    try:
        with safe_open(file, "pt") as opened:
            _check_header(file)
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            sizes = {key: _Size.of_slice(part) for key, part in slices.items()}
            return _match(model, layers, config, sizes, opened.get_tensor, str(file))
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file: {error}") from None


def _check_header(file: Path) -> None:
    """Of a key that comes twice safetensors takes the last, and another reader perhaps the first."""
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")  # safetensors has refused a wrong one
        try:
            json.loads(opened.read(size), object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: expected a safetensors file: {error}") from None


def read_state_dict(
    layers: Mapping[str, NamedAdapters],
    tensors: Mapping[str, torch.Tensor],
    lora_alpha: float | None,
    use_rslora: bool,
) -> ReadAdapter:
    """The adapter in a state dict with the keys of PEFT's files, with or without ``base_model.model.``.

    r is that of each A; ``lora_alpha`` None: scaling is 1. Raises ValueError as :func:`read_adapter`.
    """
    if lora_alpha is not None and not _is_number(lora_alpha):
        raise ValueError(f"lora_alpha: expected a finite number, got {lora_alpha!r}")
    named: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        key = str(key)
        name = key if key.startswith(PREFIX) else PREFIX + key
        if name in named:
            raise ValueError(
                f"source: {key}: expected it once, with {PREFIX!r} or without, got both"
            )
        named[name] = tensor
    config = {field: default for field, (default, _, _) in _FIELDS.items()}
    config |= {"r": None, "lora_alpha": lora_alpha, "use_rslora": bool(use_rslora)}
    config["modules_to_save"] = HEADS
    sizes = {name: _Size.of_tensor(tensor) for name, tensor in named.items()}
    loaded = _match(None, layers, config, sizes, named.__getitem__, "source")
    if lora_alpha is None:
        for layer in loaded.layers.values():
            layer.lora_alpha = math.sqrt(layer.r) if use_rslora else layer.r
    return loaded


@dataclasses.dataclass(frozen=True)
class _Size:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...] | None  # None: it is no tensor
    dtype: object

    @classmethod
    def of_slice(cls, part) -> _Size:
        dtype = part.get_dtype()
        return cls(tuple(part.get_shape()), _DTYPES.get(dtype, dtype))

    @classmethod
    def of_tensor(cls, value: object) -> _Size:
        if not isinstance(value, torch.Tensor):
            return cls(None, type(value).__name__)
        return cls(tuple(value.shape), value.dtype)


# -- the configuration -----------------------------------------------------------------------------


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # False for a NaN


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _is_pattern(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _is_targets(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(name, str) for name in value)
    return value is None or isinstance(value, str)


# field -> (what PEFT takes when it is absent, check, words)
_FIELDS = {
    "peft_type": (None, lambda v: v == "LORA", "'LORA'"),
    "r": (8, _is_rank, "an integer >= 1"),
    "lora_alpha": (8, _is_number, "a finite number"),
    "lora_dropout": (0.0, lambda v: _is_number(v) and 0 <= v < 1, "a number in [0, 1)"),
    "use_rslora": (False, lambda v: isinstance(v, bool), "true or false"),
    "rank_pattern": ({}, _is_pattern(_is_rank), "an object of integers >= 1"),
    "alpha_pattern": ({}, _is_pattern(_is_number), "an object of finite numbers"),
    "target_modules": (None, _is_targets, "a string, a list of strings or null"),
    "target_parameters": (
        None,
        lambda v: v is None or (isinstance(v, list) and _is_targets(v)),
        "a list of strings or null",
    ),
    "modules_to_save": (
        None,
        lambda v: v is None or (isinstance(v, list) and all(name in HEADS for name in v)),
        f"null or a list of {', '.join(map(repr, HEADS))} (other modules that are trained whole are not supported)",
    ),
    "bias": ("none", lambda v: v == "none", "'none' (trained biases are not supported)"),
    "init_lora_weights": (
        True,
        lambda v: v in INITIALISATIONS,
        "true, false, 'gaussian', 'eva', 'orthogonal' or 'mica'",
    ),
}
# Fields without a say in what a trained adapter computes; any other must be unset.
_INERT = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "peft_version", "layers_to_transform", "layers_pattern", "exclude_modules", "loftq_config",
    "eva_config", "corda_config", "megatron_core", "qalora_group_size", "ensure_weight_tying",
    # How the base layer stores its weight (GPT-2's Conv1D); A is [r, in] and B [out, r] all the same.
    "fan_in_fan_out",
}  # fmt: skip


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object. Python would take the last of two equal names, and another reader the first."""
    made = dict(pairs)
    if len(made) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the name {name!r} comes twice in one object")
    return made


def _read_config(file: Path) -> dict:
    if (size := file.stat().st_size) > _MAX_CONFIG_BYTES:
        raise ValueError(f"{file}: expected at most {_MAX_CONFIG_BYTES} bytes, got {size}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(config).__name__}")
    for field, value in config.items():
        if field not in _FIELDS and field not in _INERT and value not in (None, False, [], {}):
            raise ValueError(f"{file}: {field}: expected it unset (not supported), got {value!r}")
    for field, (default, check, words) in _FIELDS.items():
        value = config.setdefault(field, default)
        if not check(value):
            raise ValueError(f"{file}: {field}: expected {words}, got {value!r}")
    # Matched in bounded time: the file may be a stranger's.
    patterns = config["patterns"] = BoundedPatterns(str(file))
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in config[field]:
            patterns.check(pattern, field)
    if isinstance(config["target_modules"], str):
        patterns.check(config["target_modules"], "target_modules")
    return config


def _lookup(config: dict, field: str, path: str, default):
    """PEFT's rule: the first pattern that matches the path, or an end of it that follows a dot."""
    for pattern, value in config[field].items():
        if config["patterns"].matches_end(pattern, path):
            return value
    return default


def _is_targeted(path: str, config: dict) -> bool:
    targets = config["target_modules"]
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return True
    if isinstance(targets, str):
        return config["patterns"].fullmatch(targets, path)
    return any(is_end(path, target) for target in targets)


# -- the tensors -----------------------------------------------------------------------------------


def _match(
    model: nn.Module | None,
    layers: Mapping[str, NamedAdapters],
    config: dict,
    sizes: Mapping[str, _Size],
    read: Callable[[str], torch.Tensor],
    source: str,
) -> ReadAdapter:
    """The adapter, all checked; tensors are read last. ``r`` None in the configuration: as A has it."""
    keys: dict[str, dict[str, str]] = {}
    heads = _heads(config, sizes, source)
    parsed = {key: _parse(key, source) for key in sizes if key not in heads.values()}
    stacks = _targeted_stacks(layers, config, {path for path, _ in parsed.values()})
    for key, (path, part) in parsed.items():
        path = stacks.get(path, path)
        parts = keys.setdefault(path, {})
        if part in parts:
            raise ValueError(f"{source}: {key}: expected one key for {path}, got {parts[part]} too")
        parts[part] = key
    if not keys:
        raise ValueError(f"{source}: expected at least one layer, got no tensors")
    loaded: dict[str, AdapterLayer] = {}
    for path, parts in keys.items():
        where = f"{source}: {next(iter(parts.values()))}"
        _check_layer(where, model, layers, path, config)
        for part in ("A", "B"):
            if part not in parts:
                raise ValueError(
                    f"{source}: {PREFIX}{path}.lora_{part}.weight: expected it, got none"
                )
        experts = layers[path].num_experts
        if isinstance(layers[path], GroupedLinear4bit) and config["lora_dropout"]:
            raise ValueError(f"{source}: {no_dropout(config['lora_dropout'])}")
        r = _lookup(config, "rank_pattern", path, config["r"]) or _rank_of(
            sizes[parts["A"]], experts
        )
        loaded[path] = AdapterLayer(
            r,
            _lookup(config, "alpha_pattern", path, config["lora_alpha"]),
            float(config["lora_dropout"]),
            config["use_rslora"],
        )
        known = f"r from {CONFIG_FILE}" if config["r"] else "r of its partner"
        for part, key in parts.items():
            _check_size(f"{source}: {key}", sizes[key], part, r, layers[path], known)
    for path, parts in keys.items():
        for part, key in parts.items():
            setattr(loaded[path], part, _read_finite(f"{source}: {key}", key, read))
    read_heads = {path: _read_finite(f"{source}: {key}", key, read) for path, key in heads.items()}
    return ReadAdapter(loaded, read_heads)


def _heads(config: dict, sizes: Mapping[str, _Size], source: str) -> dict[str, str]:
    """The keys of parameters of heads by their paths in the model."""
    found: dict[str, str] = {}
    for key, size in sizes.items():
        name = without_marks(key)
        path = name.removeprefix(PREFIX)
        *modules, parameter = path.split(".")
        of_head = set(modules) & set(config["modules_to_save"] or ())
        if not of_head or not name.startswith(PREFIX) or parameter not in ("weight", "bias"):
            continue
        if any(m.startswith("lora_") or m in _OF_WRAPPERS for m in modules):
            continue
        if path in found:
            raise ValueError(f"{source}: {key}: expected one key for {path}, got {found[path]} too")
        if size.shape is None or not 1 <= len(size.shape) <= 2 or 0 in size.shape:
            raise ValueError(
                f"{source}: {key}: expected a matrix or a bias, got {size.shape or size.dtype}"
            )
        if size.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{source}: {key}: expected float32, bfloat16 or float16, got {size.dtype}"
            )
        found[path] = key
    return found


def _parse(key: str, source: str) -> tuple[str, str]:
    """The path of the layer and "A" or "B"; ValueError for what is no matrix of an adapter."""
    if found := _KEY.fullmatch(without_marks(key)):
        return found.groups()
    for part, words in _OTHER_KEYS:
        if part in key:
            got = f"{words}, which is not supported"
            break
    else:
        got = "another name"
    expected = f"{PREFIX}<layer>.lora_A.weight or .lora_B.weight"
    raise ValueError(f"{source}: {key}: expected a key {expected}, got {got}")


def _rank_of(A: _Size, experts: int) -> int:
    return max(1, A.shape[0] // experts) if A.shape else 1


def saved_paths(stacks: Iterable[str]) -> dict[str, str]:
    """Under which path each of these stacks of experts, in the order in which their modules have them, is saved."""
    found: dict[str, str] = {}
    of_module: dict[str, list[str]] = {}
    for path in stacks:
        of_module.setdefault(path.rpartition(".")[0], []).append(path)
    for module, paths in of_module.items():
        for i, path in enumerate(reversed(paths)):
            found[path] = module + ".base_layer" * i
    return found


def _targeted_stacks(layers: Mapping, config: dict, saved: set[str]) -> dict[str, str]:
    """The stack that each path of a file stands for, of those that are stacks of experts.

    Without a configuration a module whose stacks are all in the file is known by the number of its paths.
    """
    stacks = [path for path, layer in layers.items() if isinstance(layer, GroupedLinear4bit)]
    if config["target_parameters"] is None:
        modules = {path.rpartition(".")[0] for path in stacks}
        counts = {m: sum(p == m or p.startswith(f"{m}.base_layer") for p in saved) for m in modules}
        of = {m: [p for p in stacks if p.rpartition(".")[0] == m] for m in modules}
        stacks = [path for m in modules if counts[m] == len(of[m]) for path in of[m]]
    else:
        targets = config["target_parameters"]
        stacks = [path for path in stacks if any(is_end(path, target) for target in targets)]
    return {saved: path for path, saved in saved_paths(stacks).items()}


def _check_size(
    where: str, size: _Size, part: str, r: int, layer: NamedAdapters, known: str
) -> None:
    if size.shape is None or len(size.shape) != 2:
        raise ValueError(f"{where}: expected a matrix, got {size.shape or size.dtype}")
    ranks = r * layer.num_experts
    name = "r E" if isinstance(layer, GroupedLinear4bit) else "r"
    shape = (ranks, layer.in_features) if part == "A" else (layer.out_features, ranks)
    words = (
        f"[{name}, in_features] = {shape}" if part == "A" else f"[out_features, {name}] = {shape}"
    )
    if size.shape != shape:
        raise ValueError(f"{where}: expected shape {words} with {known}, got {size.shape}")
    if size.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{where}: expected float32, bfloat16 or float16, got {size.dtype}")


def _read_finite(where: str, key: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    tensor = read(key)
    if tensor.is_meta:
        raise ValueError(f"{where}: expected a tensor with data, got one on the meta device")
    if not tensor.isfinite().all():
        raise ValueError(
            f"{where}: expected finite numbers, got a NaN or an infinity, which would spoil every output"
        )
    return tensor


def _check_layer(where: str, model: nn.Module | None, layers: Mapping, path: str, config) -> None:
    if path not in layers:
        module = None if model is None else dict(named_modules(model)).get(path)
        got = "no such module" if module is None else f"a {type(module).__name__}"
        raise ValueError(
            f"{where}: {path}: expected a LoRALinear4bit (see replace_linear), got {got}"
        )
    if layers[path].weight.is_meta:
        raise ValueError(f"{where}: {path}: expected a layer with data, got one on the meta device")
    if not isinstance(layers[path], GroupedLinear4bit) and not _is_targeted(path, config):
        raise ValueError(
            f"{where}: expected a layer of target_modules in {CONFIG_FILE} "
            f"({config['target_modules']!r}), got {path}"
        )
