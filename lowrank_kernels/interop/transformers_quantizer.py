"""The quantizer of transformers that makes and loads ``Linear4bit`` layers. docs/transformers.md."""

from __future__ import annotations

import copy
import logging
import warnings

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from ..dense_layers import DenseLayers, SkippedLayer, stacks, warning_of_stacks
from ..experts import Experts4bit, stacked_parameters
from ..formats import Weight4bit
from ..named_adapters import NamedAdapters
from ..nn import Linear4bit, LoRALinear4bit
from ..replace import move_accelerates_hook
from ..targets import BoundedPatterns
from . import transformers_adapters as adapters_in_files
from . import transformers_version as versions
from .transformers_config import METHOD, LowRankConfig, pretrained_config

__all__ = ["LowRankConfig", "LowRankQuantizer", "pretrained_config"]


class LowRankQuantizer(HfQuantizer):
    """Replaces nn.Linear and Conv1D by Linear4bit, each when its weight has been read.

    A layer stays dense (on the meta device) until then, so transformers sees an ordinary model, and
    which layers of a quantized checkpoint are in 4 bits is what its tensors say.
    """

    requires_calibration = False
    is_trainable = True
    is_compileable = True

    def __init__(self, quantization_config: LowRankConfig, **kwargs) -> None:
        # A copy: what it learns of one model does not belong to the next.
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.targets: set[str] = set()
        self.stacks: dict[
            str, Weight4bit | None
        ] = {}  # by the name of the 3-D parameter; None: not read yet
        self.stack_shapes: dict[str, tuple[int, int, int]] = {}
        self.dtype = torch.get_default_dtype()
        self.model: nn.Module | None = None
        self.skipped: list[SkippedLayer] = []
        self.conv1d: set[str] = set()
        self.readers: dict[str, str] = {}
        self.adapters: set[str] = set()  # names of the parameters of adapters that are read

    # -- before loading ----------------------------------------------------------------------------

    def validate_environment(self, device_map=None, **kwargs) -> None:
        if not versions.below(versions.TESTED[1]):
            warnings.warn(
                f"lowrank_kernels is tested with transformers >= {versions.TESTED[0]}, < {versions.TESTED[1]}, "
                f"not with {versions.version()}",
                stacklevel=2,
            )
        places = {str(p) for p in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                f"device_map: expected all modules on GPUs, or all on the CPU, got {sorted(places)}; "
                "4-bit weights cannot be offloaded"
            )

    def update_device_map(self, device_map):
        """As for bitsandbytes: a GPU if there is one."""
        if device_map is None:
            return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
        return device_map

    def adjust_max_memory(self, max_memory):
        return {device: size * 0.9 for device, size in max_memory.items()}  # room to quantize in

    def param_element_size(self, model, param_name, param) -> float:
        if not self._is_target(param_name):
            return param.element_size()
        config = self.quantization_config
        return 0.5 + (1 if config.double_quant else 4) / config.blocksize

    def param_needs_quantization(self, model, param_name, **kwargs) -> bool:
        # Never of a quantized checkpoint: transformers would accept a weight of any shape.
        return not self.pre_quantized and self._is_target(param_name)

    def _is_target(self, param_name: str) -> bool:
        path, _, name = param_name.rpartition(".")
        return (name == "weight" and path in self.targets) or param_name in self.stacks

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model, **kwargs):
        _check_whole(model.config)
        config = self.quantization_config
        rule = DenseLayers(model, (nn.Linear, Conv1D))
        tied = {
            key.removesuffix(".weight")
            for pair in model.all_tied_weights_keys.items()
            for key in pair
        }
        skipped = self.get_modules_to_not_convert(model, config.skip_modules)
        if not self.pre_quantized and config.skip_modules is not None:
            self._check_skip_modules(model)
        patterns = BoundedPatterns("quantization_config: skip_modules")
        for name, module in model.named_modules():
            if keys := stacked_parameters(module):
                self._take_experts(name, module, keys, rule, patterns, skipped)
            if not isinstance(module, (nn.Linear, Conv1D)):
                continue
            why = rule.why(name, module)
            if name in tied:
                why = "its weight is tied"
            elif why is None and any(_skips(patterns, entry, name) for entry in skipped):
                why = "in skip_modules"
            if why is None:
                self.targets.add(name)
            else:
                self.skipped.append(SkippedLayer(name, why))
        known = self.stacks.keys() | {layer.name for layer in self.skipped}
        self.skipped += [layer for layer in stacks(model) if layer.name not in known]
        self.conv1d = {n for n, m in model.named_modules() if type(m) is Conv1D}
        self.readers = rule.readers
        if self.pre_quantized and config.adapters is not None:
            self.adapters = adapters_in_files.prepare(model, config.adapters)
        storage = getattr(torch, config.quant_storage)
        if self.pre_quantized and storage.is_floating_point:
            # transformers 5.20 casts a floating tensor to the dtype of the parameter it is for.
            for name in self.targets:
                module = model.get_submodule(name)
                module.weight = nn.Parameter(module.weight.to(storage), requires_grad=False)
            for name in self.stacks:
                path, _, key = name.rpartition(".")
                stack = nn.Parameter(model.get_parameter(name).to(storage), requires_grad=False)
                model.get_submodule(path)._parameters[key] = stack

    def _take_experts(self, name, module, keys, rule, patterns, skipped) -> None:
        """The stacks of a module of experts that become 4 bits, or why not."""
        why = rule.why_experts(name, module)
        names = [f"{name}.{key}" for key in keys]
        if why is None and any(_skips(patterns, e, n) for e in skipped for n in (name, *names)):
            why = "in skip_modules"
        if why is None and not self.pre_quantized and self.quantization_config.save_as != METHOD:
            why = "transformers reads no experts in bitsandbytes' 4 bits"
        if why is None:
            self.stacks |= dict.fromkeys(names)
            self.stack_shapes |= {
                n: tuple(module._parameters[k].shape) for n, k in zip(names, keys)
            }
        else:
            self.skipped += [SkippedLayer(n, why) for n in names]

    def _check_skip_modules(self, model) -> None:
        patterns = BoundedPatterns("skip_modules")
        names = [name for name, _ in (*model.named_modules(), *model.named_parameters()) if name]
        for entry in self.quantization_config.skip_modules:
            if entry != "lm_head" and not any(_skips(patterns, entry, name) for name in names):
                raise ValueError(
                    f"skip_modules: {entry!r} matches no module of {type(model).__name__}"
                )

    # -- loading -----------------------------------------------------------------------------------

    def get_quantize_ops(self):
        from .transformers_load import Quantize

        return Quantize(self)

    def get_weight_conversions(self):
        from .transformers_load import deserializer, stack_deserializers

        if not self.pre_quantized:
            return []
        return [*stack_deserializers(self), deserializer(self.dtype, self.adapters)]

    def update_weight_conversions(self, weight_conversions, *model):
        from .transformers_experts import join_experts

        if self.pre_quantized and not self.quantization_config.mxfp4:
            weight_conversions = join_experts(weight_conversions, self)
        return super().update_weight_conversions(weight_conversions, *model)

    # -- after loading -----------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model, **kwargs):
        from .transformers_experts import as_of_model
        from .transformers_load import after_loading, reverts

        config = self.quantization_config
        layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
        for layer in layers.values():
            after_loading(layer)
        stacks = self._put_experts(model)
        if self.pre_quantized:
            adapters_in_files.finish(model, config.adapters or [])
            self._warn_of_readers(layers)
        else:
            # What no file had was initialised: a new head, which is there to be trained.
            new = sorted(self.targets - layers.keys())
            self.skipped += [SkippedLayer(name, "not in the checkpoint") for name in new]
            shapes = [layer.weight4bit.shape for layer in layers.values()]
            shapes += [stack.shape for stack in stacks.values()]
            if message := warning_of_stacks(model, shapes):
                warnings.warn(message, stacklevel=2)
        names = [*(f"{name}.weight" for name in layers), *stacks]
        # transformers undoes these when it saves. For packed bytes there is nothing to undo: such
        # layers are saved under the names that the model has for them.
        conversions = as_of_model(model._weight_conversions)
        model._weight_conversions = [c for c in conversions if reverts(c, names)]
        if config.save_as == "bitsandbytes" and config.bitsandbytes is None:
            dense = [n for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)]
            config.write_as_bitsandbytes(self.dtype, dense)
        # PEFT and TRL ask for this.
        model.is_loaded_in_4bit = True
        self.model = model
        return model

    def _put_experts(self, model) -> dict[str, Weight4bit]:
        """Modules of experts whose stacks were read in 4 bits become Experts4bit; the stacks by their names."""
        found = {name: w for name, w in self.stacks.items() if w is not None}
        for path in dict.fromkeys(name.rpartition(".")[0] for name in found):
            own = {name: w for name, w in found.items() if name.rpartition(".")[0] == path}
            stacks = {name.rpartition(".")[2]: w for name, w in own.items()}
            _replace(model, path, Experts4bit.from_weights(model.get_submodule(path), stacks))
        if found and not self.pre_quantized:
            _log.warning(
                "lowrank_kernels: %d stacks of experts are in 4 bits as well (%s, ...); routers stay dense; "
                "skip_modules leaves experts out",
                len(found),
                next(iter(found)),
            )
        if (
            found
        ):  # so what is saved is this library's own: transformers gives bitsandbytes no experts
            self.quantization_config.bitsandbytes, self.quantization_config.save_as = None, METHOD
        self.quantization_config.mxfp4 = False
        self.stacks = dict.fromkeys(self.stacks)  # of which the modules hold the weights now
        return found

    def _warn_of_readers(self, layers) -> None:
        read = [name for name in layers if name in self.readers]
        if read:
            warnings.warn(
                f"{len(read)} layers are in 4 bits in this checkpoint whose weight the model's code reads instead "
                f"of calling the layer ({read[0]}: {self.readers[read[0]]}, ...): that code may fail; quantize the "
                "model again to have them dense",
                stacklevel=2,
            )

    def is_serializable(self, **kwargs) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether Trainer accepts the model without PEFT: if replace_linear gave it adapters."""
        return any(isinstance(m, NamedAdapters) for m in self.model.modules())

    def _dequantize(self, model, dtype=None):
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, experts in list(model.named_modules()):
            if isinstance(experts, Experts4bit):
                _replace(model, name, experts.dequantized(dtype))
        layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
        for name, layer in layers.items():
            if isinstance(layer, LoRALinear4bit):
                raise ValueError(
                    f"dequantize: {name}: expected a layer without adapters, got {list(layer.r)}"
                )
        for name, layer in layers.items():
            weight = layer.dequantize().to(dtype)  # as bitsandbytes rounds
            if name in self.conv1d:
                dense, weight = Conv1D(layer.out_features, layer.in_features), weight.T.contiguous()
            else:
                shape = layer.in_features, layer.out_features
                dense = nn.Linear(*shape, bias=False, device="meta", dtype=dtype)
            dense.weight = nn.Parameter(weight)
            if layer.bias is not None:
                dense.bias = nn.Parameter(layer.bias.detach().to(dtype))
            _replace(model, name, dense.train(layer.training))
        del model.is_loaded_in_4bit
        self.model = None
        return model


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """``model.set_submodule`` that keeps accelerate's hook."""
    old = model.get_submodule(name)
    move_accelerates_hook(old, new)
    model.set_submodule(name, new)


def _skips(patterns: BoundedPatterns, entry: str, name: str) -> bool:
    """transformers' rule (should_convert_module), in bounded time: a start of the name, or its end."""
    return name.endswith(entry) or patterns.matches_start(entry, name)


_log = logging.getLogger(__name__)

auto.register_quantization_config(METHOD)(LowRankConfig)
auto.register_quantizer(METHOD)(LowRankQuantizer)


def _check_whole(config) -> None:
    """That transformers is not to give each process a part, while 4-bit weights are made of whole ones."""
    asked = getattr(config, "distributed_config", None)
    names = "tp_size", "pp_size", "ep_size", "fsdp_size", "dp_replicate_size"
    sizes = {name: getattr(asked, name, None) or 1 for name in names}
    if parts := {name: size for name, size in sizes.items() if size > 1}:
        raise ValueError(
            f"distributed_config: expected none for weights in 4 bits, got {parts}; load the whole model in each "
            "process, then call lowrank_kernels.distributed.parallelize or torch's fully_shard"
        )
