"""Adapters of a model in files of PEFT's format: :func:`save_adapter`, :func:`load_adapter`."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from .adapter import AdapterLayer, check_adapter_name
from .adapter_format import CONFIG_FILE, HEADS, WEIGHTS_FILE, read_adapter, saved_paths
from .experts import GroupedLinear4bit
from .frozen4bit import Frozen4bit
from .named_adapters import NamedAdapters, adapted_layers
from .nn import PREFIX
from .paths import named_modules, some, unwrap
from .targets import is_end, matches

_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")
# The end of a class's name -> PEFT's task_type.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}


def save_adapter(model: nn.Module, path: str | os.PathLike, name: str = "default") -> None:
    """Writes adapter ``name`` of ``model`` to folder ``path``, for PEFT or :func:`load_adapter`.

    A and B keep their dtype. Paths are those of the model inside of its wrappers (``torch.compile``,
    DistributedDataParallel, checkpoint wrappers, PEFT's). Each file is written under another name and
    then renamed. A warning names what requires gradients and is not in the file, such as biases,
    norms, a head, or other adapters: nobody else saves it.

    ``adapter_model.safetensors`` holds ``base_model.model.<path>.lora_A.weight [r, K]`` and ``.lora_B.weight [N, r]``
    of each layer, ``adapter_config.json`` the settings. Of a classifier or reward model
    (``...ForSequenceClassification`` and ``...ForTokenClassification``) the dense head, ``score`` or ``classifier``,
    goes into the file too, as PEFT's ``modules_to_save``.

    Raises:
        ValueError: no layer has the adapter; its layers differ in lora_dropout or use_rslora, which the format
            holds only once; a parameter is on the meta device, as those of an offloaded model are.
        RuntimeError: a layer is one process's part (see :func:`lowrank_kernels.distributed.save_adapter`).

    Source: the format of PEFT, https://huggingface.co/docs/peft/developer_guides/checkpoint.

    >>> import torch, lowrank_kernels as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    >>> report = lk.replace_linear(model, r=8, adapter_name="policy", progress=False)
    >>> lk.save_adapter(torch.compile(model), "adapter", "policy")
    >>> from safetensors import safe_open
    >>> sorted(safe_open("adapter/adapter_model.safetensors", "pt").keys())[0]
    'base_model.model.0.lora_A.weight'
    """
    write_adapter(model, path, name, lambda layer: layer.whole_adapter(name))


def write_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    name: str,
    parameters: Callable[[NamedAdapters], tuple[torch.Tensor, torch.Tensor]],
    heads: dict[str, nn.Module] | None = None,
    warn: bool = True,
) -> None:
    """:func:`save_adapter` with A and B of each layer from ``parameters``.

    ``heads``: by the path that each has in a model for sequence classification; None: those of ``model``. ``warn``:
    whether a warning names what trains and is in no file.
    """
    layers = adapted_layers(model)
    adapters = sorted({adapter for layer in layers.values() for adapter in layer.r})
    everywhere = layers.values()
    layers = {layer_path: layer for layer_path, layer in layers.items() if name in layer.r}
    if not layers:
        raise ValueError(f"name: expected an adapter of the model, one of {adapters}, got {name!r}")
    heads = _heads_of(model) if heads is None else heads
    config = _config_of(model, layers, name, heads)
    if warn:
        _warn_of_the_rest(model, everywhere, name, heads)
    tensors = {}
    stacks = saved_paths(p for p, layer in layers.items() if isinstance(layer, GroupedLinear4bit))
    for layer_path, layer in layers.items():
        saved = stacks.get(layer_path, layer_path)
        for part, parameter in zip(("lora_A", "lora_B"), parameters(layer), strict=True):
            if parameter.is_meta:
                raise ValueError(
                    f"name: {layer_path}.{part}: expected a parameter with data, got one on the meta device (is the "
                    "model offloaded? Save it before, or after accelerate.hooks.remove_hook_from_submodules)"
                )
            tensor = parameter.detach().to("cpu", copy=True).contiguous()
            tensors[f"{PREFIX}{saved}.{part}.weight"] = tensor
    for head_path, head in heads.items():
        for own, parameter in head.named_parameters():
            tensor = parameter.detach().to("cpu", copy=True).contiguous()
            tensors[f"{PREFIX}{head_path}.{own}"] = tensor
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

    The file may be a stranger's: keys, shapes and dtypes are compared with the layers before the first
    tensor is read, patterns are matched in bounded time, NaN and infinities are refused. Any finite
    ``lora_alpha`` is taken: 0 switches an adapter off, a negative one takes away what it learnt.
    Names that torch's wrappers left in keys (``_orig_mod``) are passed over.

    A head that was trained whole, ``score`` or ``classifier`` of a reward model or classifier, is copied into the
    model's module of that path, of which there is one for all adapters. A model without it, such as the language model
    that the reward model was made of, takes the adapter alone, and a warning says so; :class:`AdapterBank` keeps heads.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: naming the file, the key, what was expected and what came: a layer that is no
            :class:`LoRALinear4bit`, wrong shapes, missing partners, numbers that are not finite, and what the
            layers cannot represent (DoRA, trained biases, embeddings or other modules, initialisations that
            change the base weight).
        RuntimeError: an adapter is merged.

    >>> import torch, lowrank_kernels as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    >>> report = lk.replace_linear(model, r=8, adapter_name="policy", progress=False)
    >>> lk.save_adapter(model, "adapter", "policy")
    >>> lk.load_adapter(model, "adapter", "again")
    >>> model[0].active_adapter, model[0].r
    ('again', {'policy': 8, 'again': 8})
    """
    check_adapter_name(name)
    layers = adapted_layers(model)
    for layer_path, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"load_adapter: {layer_path} is merged; call unmerge() first")
        if name in layer.r and not all(
            "weight" in m._parameters for m in layer.adapter_modules(name)
        ):
            raise ValueError(
                f"name: {layer_path}: adapter {name!r} computes its weight (it is parametrized, pruned or has weight "
                "norm), so values cannot be loaded into it; delete it first, or give another name"
            )
    loaded, heads = read_adapter(layers, path, model)
    head_parameters = _check_heads(model, heads, path)

    for layer_path, layer in layers.items():
        if layer_path in loaded:
            assign(layer, name, loaded[layer_path])
        elif name in layer.r:
            layer.delete_adapter(name)
        layer.set_adapter(name)
    with torch.no_grad():
        for parameter, tensor in head_parameters:
            parameter.copy_(tensor)


# -- saving ----------------------------------------------------------------------------------------


def _write(target: Path, write: Callable[[Path], object]) -> None:
    """A reader sees the old file or the new one, never half of it."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _heads_of(model: nn.Module) -> dict[str, nn.Module]:
    """The dense heads of a classifier or reward model of transformers by path; {} of any other model."""
    if not type(unwrap(model)).__name__.endswith(_CLASSIFIERS):
        return {}
    found = {path: module for path, module in named_modules(model) if path in HEADS}
    return {
        path: head
        for path, head in found.items()
        if next(head.parameters(), None) is not None and not _is_quantized(head)
    }


def _is_quantized(head: nn.Module) -> bool:
    return any(isinstance(module, Frozen4bit) for module in head.modules())


def _warn_of_the_rest(
    model: nn.Module, layers: Iterable[NamedAdapters], name: str, heads: dict[str, nn.Module]
) -> None:
    """Names what trains and is in no adapter file, so that nobody takes the file for the whole model."""
    adapter_of = {
        id(part): adapter
        for layer in layers
        for adapter in layer.r
        for module in layer.adapter_modules(adapter)
        for part in module.parameters()
    }
    adapter_of |= {id(part): name for head in heads.values() for part in head.parameters()}
    rest: dict[str, None] = {}
    for path, module in named_modules(model):
        for own, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            adapter = adapter_of.get(id(parameter))
            if adapter is None:
                rest[f"{path}.{own}" if path else own] = None
            elif adapter != name:
                rest[f"adapter {adapter!r}"] = None
    if rest:
        warnings.warn(
            f"save_adapter: what requires gradients and is not in the file of adapter {name!r}, which holds its A "
            f"and B alone: {some(rest)}. If it was trained, save it too: other adapters by their names, "
            "the rest from model.state_dict()",
            stacklevel=4,
        )


def _config_of(
    model: nn.Module, layers: dict[str, NamedAdapters], name: str, heads: dict[str, nn.Module]
) -> dict:
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
    base = unwrap(model)
    model_config = getattr(base, "config", None)
    tasks = [task for end, task in _TASKS.items() if type(base).__name__.endswith(end)]
    if heads and "TOKEN_CLS" not in tasks:
        tasks = ["SEQ_CLS"]
    return {
        "peft_type": "LORA",
        "task_type": next(iter(tasks), None),
        "base_model_name_or_path": getattr(model_config, "name_or_path", None) or None,
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": single("lora_dropout"),
        "use_rslora": single("use_rslora"),
        "target_modules": _target_modules(
            model, [p for p, l in layers.items() if not isinstance(l, GroupedLinear4bit)]
        ),
        "target_parameters": _target_parameters(
            model, [p for p, l in layers.items() if isinstance(l, GroupedLinear4bit)]
        ),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": sorted(heads) or None,
        "inference_mode": True,
    }


def _target_modules(model: nn.Module, layers: Iterable[str]) -> list[str] | str:
    """Short names if they select just these layers of the plain model, else paths, else a regex."""
    wanted = set(layers)
    known = adapted_layers(model)
    inside = tuple(f"{path}." for path in known)
    stacks = {path for path, layer in known.items() if isinstance(layer, GroupedLinear4bit)}
    paths = {path for path, _ in named_modules(model) if not path.startswith(inside)} - stacks
    for names in (sorted({path.rpartition(".")[2] for path in wanted}), sorted(wanted)):
        if {path for path in paths if matches(path, names)} == wanted:
            return names
    return "|".join(re.escape(path) for path in sorted(wanted))


def _target_parameters(model: nn.Module, stacks: list[str]) -> list[str] | None:
    """Module and parameter, such as "experts.down_proj", if they select just these stacks, else paths."""
    if not stacks:
        return None
    known = adapted_layers(model)
    every = [path for path, layer in known.items() if isinstance(layer, GroupedLinear4bit)]
    short = sorted({".".join(path.split(".")[-2:]) for path in stacks})
    chosen = {path for path in every if any(is_end(path, name) for name in short)}
    return short if chosen == set(stacks) else sorted(stacks)


# -- loading ---------------------------------------------------------------------------------------


def _check_heads(
    model: nn.Module, heads: dict[str, torch.Tensor], source: object
) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Each parameter of the model's own heads that the file has, with its values; all of a head or none of it."""
    modules = dict(named_modules(model))
    places: list[tuple[nn.Parameter, torch.Tensor]] = []
    absent: list[str] = []
    for root in sorted({_head_of(path) for path in heads}):
        head = modules.get(root)
        of_file = {path: tensor for path, tensor in heads.items() if _head_of(path) == root}
        if head is None:
            absent += of_file
            continue
        if _is_quantized(head):
            raise ValueError(
                f"{source}: {root}: expected the model's head to be dense (exclude_modules of replace_linear), "
                "got one in 4 bits"
            )
        own = {f"{root}.{part}": parameter for part, parameter in head.named_parameters()}
        if own.keys() != of_file.keys():
            raise ValueError(
                f"{source}: {root}: expected the parameters of the model's head, {sorted(own)}, got {sorted(of_file)}"
            )
        for path, tensor in of_file.items():
            if tensor.shape != own[path].shape or not own[path].is_floating_point():
                raise ValueError(
                    f"{source}: {path}: expected shape {tuple(own[path].shape)} as the model has it, "
                    f"got {tuple(tensor.shape)}"
                )
            if own[path].is_meta:
                raise ValueError(
                    f"{source}: {path}: expected a head with data, got one on the meta device"
                )
            places.append((own[path], tensor))
    if absent:
        warnings.warn(
            f"load_adapter: {source} holds a head that this model has no module for: {some(absent)}. The adapter "
            "alone was loaded; a model for sequence classification, an AdapterBank or rlhf.RoleModel takes both",
            stacklevel=3,
        )
    return places


def _head_of(path: str) -> str:
    """The path of the head of which ``path`` is a parameter."""
    parts = path.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part in HEADS) + 1])


@torch.no_grad()
def assign(layer: NamedAdapters, name: str, loaded: AdapterLayer) -> None:
    """Gives ``layer`` the adapter ``loaded`` under ``name``; one of the same r keeps its parameters."""
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
