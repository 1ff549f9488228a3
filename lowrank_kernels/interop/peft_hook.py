"""Has PEFT make a :class:`PeftLinear4bit` (peft_layer.py) of every ``Linear4bit``, without importing PEFT."""

from __future__ import annotations

import functools
import sys
import warnings
from types import ModuleType

from .. import replace
from ..experts import Experts4bit, GroupedLinear4bit
from ..frozen4bit import Frozen4bit
from ..linear4bit import Linear4bit
from .on_import import on_import


def register() -> None:
    on_import("peft.tuners.lora.model", _install)
    on_import("peft.tuners.tuners_utils", _watch_injection)


def _install(lora_model: ModuleType) -> None:
    """Puts our dispatcher before PEFT's last one, that for torch's own layers.

    So what a user registered (``config._register_custom_module``) still comes first.
    """
    default = getattr(lora_model, "dispatch_default", None)
    if default is None:
        warnings.warn(
            f"lowrank_kernels: {_expected()}; Linear4bit layers are not fused", stacklevel=2
        )
    elif default.__module__ != __name__:
        lora_model.dispatch_default = _before(default)
        replace.adapter_layers = _AdapterLayers()
        _refuse_copies(sys.modules["peft.utils.other"].ModulesToSaveWrapper)


class _AdapterLayers:
    """For replace_linear on a model that has PEFT's layers already."""

    def why_not(self, layer) -> str | None:
        from .peft_layer import why_not

        return why_not(layer)

    def adopt(self, layer) -> None:
        from .peft_layer import adopt

        adopt(layer)


def _watch_injection(tuners_utils: ModuleType) -> None:
    """Every method of PEFT makes its layers in ``inject_adapter``: it is refused or taken on there."""
    inject = tuners_utils.BaseTuner.inject_adapter

    @functools.wraps(inject)
    def inject_adapter(self, model, *args, **kwargs):
        if not any(isinstance(module, Frozen4bit) for module in model.modules()):
            return inject(self, model, *args, **kwargs)
        from .peft_experts import stacks_as_parameters
        from .peft_methods import adopt_layers, check_target

        create, exists = self._create_and_replace, self._check_target_module_exists
        # Parameters, not layers: target_parameters is for them.
        stacks = {n for n, m in model.named_modules() if isinstance(m, GroupedLinear4bit)}

        def create_and_replace(peft_config, adapter_name, target, *rest, **more):
            check_target(peft_config, target)
            return create(peft_config, adapter_name, target, *rest, **more)

        self._create_and_replace = create_and_replace
        self._check_target_module_exists = lambda config, key: (
            False if key in stacks else exists(config, key)
        )
        try:
            with stacks_as_parameters():
                result = inject(self, model, *args, **kwargs)
        finally:
            del self._create_and_replace, self._check_target_module_exists
        adopt_layers(model)
        return result

    tuners_utils.BaseTuner.inject_adapter = inject_adapter


def _expected() -> str:
    version = getattr(sys.modules.get("peft"), "__version__", "another version")
    return f"peft: expected version 0.19 or later, got {version}"


def _before(default):
    def dispatch_default(target, adapter_name, **kwargs):
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if kwargs.get("parameter_name") is not None and isinstance(base, Experts4bit):
            from .peft_experts import dispatch as dispatch_experts

            return dispatch_experts(target, adapter_name, **kwargs)
        if not isinstance(base, Linear4bit):
            return default(target, adapter_name, **kwargs)
        try:
            from .peft_layer import dispatch
        except ImportError as error:
            raise ImportError(f"{_expected()}: {error}") from error
        if "config" not in kwargs:
            raise ImportError(_expected())
        return dispatch(target, adapter_name, **kwargs)

    return dispatch_default


def _refuse_copies(wrapper: type) -> None:
    """``modules_to_save`` trains a copy of a module, which in 4 bits would never change: an error instead."""
    check_module = wrapper.check_module

    def check(self) -> None:
        check_module(self)
        if any(isinstance(module, Frozen4bit) for module in self.original_module.modules()):
            raise TypeError(
                "modules_to_save: expected modules with dense weights, got "
                f"{type(self.original_module).__name__} in 4 bits, which cannot be trained; leave it out of "
                "the quantization (replace_linear's exclude_modules) or name it in target_modules"
            )

    wrapper.check_module = check
