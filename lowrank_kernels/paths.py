"""The paths of a model's modules without the names that wrappers put into them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

# The attribute under which a wrapper keeps the module that it wraps, by the name of the wrapper's class or
# of a base class of it. Names, so that none of these libraries has to be imported. "module" alone would
# say nothing: it is a fair name for a layer of a model.
_WRAPPED = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "ActivationWrapper": "_checkpoint_wrapped_module",  # checkpoint_wrapper, offload_wrapper
    "FullyShardedDataParallel": "_fsdp_wrapped_module",  # FSDP1
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",  # torch.optim.swa_utils
    "DeepSpeedEngine": "module",
    "PeftModel": "base_model",
    "PeftMixedModel": "base_model",
    "BaseTuner": "model",  # PEFT's, inside of a PeftModel
    "XLoraModel": "lora_model",
    "BaseTunerLayer": "base_layer",
}
_SHOWN = 4  # paths that a message names
# What torch's own wrappers leave in the keys of a state dict. No module of a model is called like that.
_MARKS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` with the paths of the model inside all wrappers, of ``model`` and of its parts.

    A wrapper has the path of what it wraps and comes before it. Each module comes once, by its first path.
    """
    yield from _walk(model, "", set())


def _walk(module: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    if module in seen:
        return
    seen.add(module)
    yield path, module
    wrapped = _wrapped_name(module)
    for name, child in module._modules.items():
        if child is None:
            continue
        below = f"{path}.{name}" if path else name
        yield from _walk(child, path if name == wrapped else below, seen)


def _wrapped_name(module: nn.Module) -> str | None:
    for cls in type(module).__mro__:
        name = _WRAPPED.get(cls.__name__)
        if name in module._modules:
            return name
    return None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside all wrappers around it."""
    while (name := _wrapped_name(model)) is not None:
        model = model._modules[name]
    return model


def without_marks(path: str) -> str:
    """``path``, as a file has it, without what torch's wrappers leave in the keys of a state dict."""
    for mark in _MARKS:
        path = path.replace(mark, "")
    return path


def some(paths: Iterable[str]) -> str:
    """The first paths, and how many more there are: what a message names."""
    paths = list(paths)
    rest = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(paths[:_SHOWN]) + rest
