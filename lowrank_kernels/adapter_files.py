"""Adapters in PEFT's file format: a folder with a configuration and a safetensors file.

Layer ``<path>`` of the model is saved as ``base_model.model.<path>.lora_A.weight [r, K]`` and
``base_model.model.<path>.lora_B.weight [N, r]``. The configuration gives r and lora_alpha, and for
single layers, by regular expressions, ``rank_pattern`` and ``alpha_pattern``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .adapter import AdapterLayer, check_adapter_name
from .nn import PREFIX, LoRALinear4bit, lora_layers
from .schema import FLOAT_DTYPES
from .targets import BoundedPatterns, is_end, matches

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_KEY = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")
_MAX_CONFIG_BYTES = 2**24
# PEFT's init_lora_weights. The others change the base weight, which a 4-bit base cannot follow.
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


def save_adapter(model: nn.Module, path: str | os.PathLike, name: str = "default") -> None:
    """Writes adapter ``name`` of ``model`` to folder ``path``, for PEFT or :func:`load_adapter`.

    A and B keep their dtype. Each file is written under another name and then renamed.
    Raises ValueError if no layer has the adapter, or if its layers differ in lora_dropout or
    use_rslora, which the format holds only once; RuntimeError for a layer that is one process's part
    (see :func:`lowrank_kernels.distributed.save_adapter`).
    """
    write_adapter(model, path, name, lambda layer: layer.whole_adapter(name))


def write_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    name: str,
    parameters: Callable[[LoRALinear4bit], tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """:func:`save_adapter` with A and B of each layer from ``parameters``."""
    layers = lora_layers(model)
    adapters = sorted({adapter for layer in layers.values() for adapter in layer.r})
    layers = {layer_path: layer for layer_path, layer in layers.items() if name in layer.r}
    if not layers:
        raise ValueError(f"name: expected an adapter of the model, one of {adapters}, got {name!r}")
    config = _config_of(model, layers, name)
    tensors = {}
    for layer_path, layer in layers.items():
        for part, parameter in zip(("lora_A", "lora_B"), parameters(layer), strict=True):
            tensor = parameter.detach().to("cpu", copy=True).contiguous()
            tensors[f"{PREFIX}{layer_path}.{part}.weight"] = tensor
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / WEIGHTS_FILE, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    text = json.dumps(config, indent=2, sort_keys=True)
    _write(folder / CONFIG_FILE, lambda file: file.write_text(text, encoding="utf-8"))


def load_adapter(model: nn.Module, path: str | os.PathLike, name: str = "default") -> None:
    """Loads the adapter in folder ``path`` (PEFT's format) as ``name`` and makes it active.

    It replaces an adapter of that name: a layer that has it with the same r keeps its parameters
    (an optimizer goes on working) and takes the values; a layer not in the file loses it. All of
    the file is checked before anything changes. Only safetensors is read, never pickle.

    Raises FileNotFoundError if a file is missing; ValueError, naming the file, the key, what was
    expected and what came, for a layer that is no :class:`LoRALinear4bit`, wrong shapes, missing
    partners and what the layers cannot represent (DoRA, trained biases or other modules,
    initialisations that change the base weight); RuntimeError while an adapter is merged.
    """
    check_adapter_name(name)
    layers = lora_layers(model)
    for layer_path, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"load_adapter: {layer_path} is merged; call unmerge() first")
    loaded = read_adapter(layers, path, model)

    for layer_path, layer in layers.items():
        if layer_path in loaded:
            _assign(layer, name, loaded[layer_path])
        elif name in layer.r:
            layer.delete_adapter(name)
        layer.set_adapter(name)


# -- saving ----------------------------------------------------------------------------------------


def _write(target: Path, write: Callable[[Path], object]) -> None:
    """A reader sees the old file or the new one, never half of it."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _config_of(model: nn.Module, layers: dict[str, LoRALinear4bit], name: str) -> dict:
    def single(field: str):
        values = {getattr(layer, field)[name] for layer in layers.values()}
        if len(values) > 1:
            raise ValueError(f"name: expected one {field} in all layers of {name!r}, got {values}")
        return values.pop()

    def common(field: str) -> tuple[object, dict[str, object]]:
        """The commonest value and a pattern for each layer that deviates."""
        values = {path: getattr(layer, field)[name] for path, layer in layers.items()}
        most = Counter(values.values()).most_common(1)[0][0]
        # PEFT looks for a match at the end of the path; ^ keeps "0.proj" off "1.0.proj".
        return most, {"^" + re.escape(path): v for path, v in values.items() if v != most}

    r, rank_pattern = common("r")
    lora_alpha, alpha_pattern = common("lora_alpha")
    base = model.get_submodule("base_model.model") if _is_wrapped(model) else model
    model_config = getattr(base, "config", None)
    causal = type(base).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": getattr(model_config, "name_or_path", None) or None,
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": single("lora_dropout"),
        "use_rslora": single("use_rslora"),
        "target_modules": _target_modules(model, layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _is_wrapped(model: nn.Module) -> bool:
    return any(path == PREFIX[:-1] for path, _ in model.named_modules())


def _target_modules(model: nn.Module, layers: Iterable[str]) -> list[str] | str:
    """Short names if they select just these layers of the plain model, else paths, else a regex."""
    wanted = set(layers)
    inside = tuple(f"{path}." for path in lora_layers(model))
    paths = {path.removeprefix(PREFIX) for path, _ in model.named_modules()}
    paths = {path for path in paths if not path.startswith(inside)}
    for names in (sorted({path.rpartition(".")[2] for path in wanted}), sorted(wanted)):
        if {path for path in paths if matches(path, names)} == wanted:
            return names
    return "|".join(re.escape(path) for path in sorted(wanted))


# -- loading ---------------------------------------------------------------------------------------


def read_adapter(
    layers: Mapping[str, LoRALinear4bit], path: str | os.PathLike, model: nn.Module | None = None
) -> dict[str, AdapterLayer]:
    """The adapter in folder ``path`` by layer, all of it checked; ``model``, if given, for better messages.

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
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file: {error}") from None
    return _match(model, layers, config, tensors, str(file))


def read_state_dict(
    layers: Mapping[str, LoRALinear4bit],
    tensors: Mapping[str, torch.Tensor],
    lora_alpha: float | None,
    use_rslora: bool,
) -> dict[str, AdapterLayer]:
    """The adapter in a state dict with the keys of PEFT's files, with or without ``base_model.model.``.

    r is that of each A; ``lora_alpha`` None: scaling is 1. Raises ValueError as :func:`read_adapter`.
    """
    if lora_alpha is not None and not _is_number(lora_alpha):
        raise ValueError(f"lora_alpha: expected a finite number, got {lora_alpha!r}")
    names = {key: key if key.startswith(PREFIX) else PREFIX + key for key in map(str, tensors)}
    config = {field: default for field, (default, _, _) in _FIELDS.items()}
    config |= {"r": None, "lora_alpha": lora_alpha, "use_rslora": bool(use_rslora)}
    loaded = _match(None, layers, config, {names[k]: v for k, v in tensors.items()}, "source")
    if lora_alpha is None:
        for layer in loaded.values():
            layer.lora_alpha = math.sqrt(layer.r) if use_rslora else layer.r
    return loaded


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
    "bias": ("none", lambda v: v == "none", "'none' (trained biases are not supported)"),
    "init_lora_weights": (
        True,
        lambda v: v in INITIALISATIONS,
        "true, false, 'gaussian', 'eva' or 'orthogonal'",
    ),
}
# Fields without a say in what a trained adapter computes; any other must be unset.
_INERT = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "peft_version", "layers_to_transform", "layers_pattern", "exclude_modules", "loftq_config",
    "eva_config", "corda_config", "megatron_core", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip


def _read_config(file: Path) -> dict:
    if (size := file.stat().st_size) > _MAX_CONFIG_BYTES:
        raise ValueError(f"{file}: expected at most {_MAX_CONFIG_BYTES} bytes, got {size}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
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


def _match(
    model: nn.Module | None,
    layers: Mapping[str, LoRALinear4bit],
    config: dict,
    tensors: Mapping[str, torch.Tensor],
    source: str,
) -> dict[str, AdapterLayer]:
    """``tensors`` by layer, all checked. ``r`` None in the configuration: as A has it."""
    loaded: dict[str, AdapterLayer] = {}
    for key, tensor in tensors.items():
        if not (found := _KEY.fullmatch(key)):
            expected = f"{PREFIX}<layer>.lora_A.weight or .lora_B.weight"
            raise ValueError(f"{source}: {key}: expected a key {expected}")
        path, part = found.groups()
        where = f"{source}: {key}"
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2:
            got = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{where}: expected a matrix, got {got}")
        if path not in loaded:
            _check_layer(where, model, layers, path, config)
            r = _lookup(config, "rank_pattern", path, config["r"])
            loaded[path] = AdapterLayer(
                r or max(1, tensor.shape["AB".index(part)]),
                _lookup(config, "alpha_pattern", path, config["lora_alpha"]),
                float(config["lora_dropout"]),
                config["use_rslora"],
            )
        layer, r = layers[path], loaded[path].r
        shape = (r, layer.in_features) if part == "A" else (layer.out_features, r)
        words = f"[r, in_features] = {shape}" if part == "A" else f"[out_features, r] = {shape}"
        if tuple(tensor.shape) != shape:
            known = f"r from {CONFIG_FILE}" if config["r"] else "r of its partner"
            raise ValueError(
                f"{where}: expected shape {words} with {known}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{where}: expected float32, bfloat16 or float16, got {tensor.dtype}")
        setattr(loaded[path], part, tensor)
    if not loaded:
        raise ValueError(f"{source}: expected at least one layer, got no tensors")
    for path, layer in loaded.items():
        for part in ("A", "B"):
            if getattr(layer, part) is None:
                raise ValueError(
                    f"{source}: {PREFIX}{path}.lora_{part}.weight: expected it, got none"
                )
    return loaded


def _check_layer(where: str, model: nn.Module | None, layers: Mapping, path: str, config) -> None:
    if path not in layers:
        modules = {} if model is None else dict(model.named_modules())
        module = modules.get(path, modules.get(PREFIX + path))
        got = "no such module" if module is None else f"a {type(module).__name__}"
        raise ValueError(
            f"{where}: {path}: expected a LoRALinear4bit (see replace_linear), got {got}"
        )
    if layers[path].weight.is_meta:
        raise ValueError(f"{where}: {path}: expected a layer with data, got one on the meta device")
    if not _is_targeted(path, config):
        raise ValueError(
            f"{where}: expected a layer of target_modules in {CONFIG_FILE} "
            f"({config['target_modules']!r}), got {path}"
        )


@torch.no_grad()
def _assign(layer: LoRALinear4bit, name: str, loaded: AdapterLayer) -> None:
    kept = None
    if name in layer.r:
        if layer.r[name] == loaded.r:
            kept = layer.lora_A[name], layer.lora_B[name]
        layer.delete_adapter(name)
    layer.add_adapter(name, loaded.r, loaded.lora_alpha, loaded.lora_dropout, loaded.use_rslora)
    if kept:
        layer.lora_A[name], layer.lora_B[name] = kept
    parts = layer.shard_of_adapter(loaded.A, loaded.B)
    for parameter, part in zip(layer.adapter_parameters(name), parts, strict=True):
        parameter.copy_(part)
