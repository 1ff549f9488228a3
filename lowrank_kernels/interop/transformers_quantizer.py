"""The quantizer of transformers that makes and loads ``Linear4bit`` layers. docs/transformers.md."""

from __future__ import annotations

import copy
import functools
import warnings

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..nn import Linear4bit, LoRALinear4bit
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
        self.dtype = torch.get_default_dtype()
        self.model: nn.Module | None = None

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
        return name == "weight" and path in self.targets

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model, **kwargs):
        config = self.quantization_config
        in_float32 = [
            *(model._keep_in_fp32_modules or ()),
            *(model._keep_in_fp32_modules_strict or ()),
            *(
                key.removesuffix(".weight")
                for pair in model.all_tied_weights_keys.items()
                for key in pair
            ),
        ]
        dense = self.get_modules_to_not_convert(model, config.skip_modules, in_float32)
        for name, module in model.named_modules():
            if type(module) in (nn.Linear, Conv1D) and should_convert_module(name, dense):
                self.targets.add(name)
        storage = getattr(torch, config.quant_storage)
        if self.pre_quantized and storage.is_floating_point:
            # transformers 5.20 casts a floating tensor to the dtype of the parameter it is for.
            for name in self.targets:
                module = model.get_submodule(name)
                module.weight = nn.Parameter(module.weight.to(storage), requires_grad=False)

    # -- loading -----------------------------------------------------------------------------------

    def get_quantize_ops(self):
        from .transformers_load import Quantize

        return Quantize(self)

    def get_weight_conversions(self):
        from .transformers_load import deserializer

        return [deserializer(self.dtype)] if self.pre_quantized else []

    # -- after loading -----------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model, **kwargs):
        from .transformers_load import after_loading, reverts

        config = self.quantization_config
        layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
        for layer in layers.values():
            after_loading(layer)
        if not self.pre_quantized:
            for name in self.targets:  # what no file had was initialised dense
                layer = model.get_submodule(name)
                if type(layer) is nn.Linear:
                    _replace(model, name, Linear4bit.from_linear(layer, *config.quantize_args))
        names = [f"{name}.weight" for name in layers]
        # transformers undoes these when it saves. For packed bytes there is nothing to undo: such
        # layers are saved under the names that the model has for them.
        model._weight_conversions = [c for c in model._weight_conversions if reverts(c, names)]
        if config.save_as == "bitsandbytes" and config.bitsandbytes is None:
            dense = [n for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)]
            config.write_as_bitsandbytes(self.dtype, dense)
        # PEFT and TRL ask for this. transformers then counts parameters with bitsandbytes' help.
        model.is_loaded_in_4bit = True
        model.num_parameters = functools.partial(_num_parameters, model)
        self.model = model
        return model

    def is_serializable(self, **kwargs) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether Trainer accepts the model without PEFT: if replace_linear gave it adapters."""
        return any(isinstance(m, LoRALinear4bit) for m in self.model.modules())

    def _dequantize(self, model, dtype=None):
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
        for name, layer in layers.items():
            if isinstance(layer, LoRALinear4bit):
                raise ValueError(
                    f"dequantize: {name}: expected a layer without adapters, got {list(layer.r)}"
                )
        for name, layer in layers.items():
            dense = nn.Linear(
                layer.in_features, layer.out_features, bias=False, device="meta", dtype=dtype
            )
            dense.weight = nn.Parameter(layer.dequantize().to(dtype))  # as bitsandbytes rounds
            if layer.bias is not None:
                dense.bias = nn.Parameter(layer.bias.detach().to(dtype))
            _replace(model, name, dense.train(layer.training))
        del model.is_loaded_in_4bit, model.num_parameters
        self.model = None
        return model


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """``model.set_submodule`` that keeps accelerate's hook."""
    old = model.get_submodule(name)
    if (hook := getattr(old, "_hf_hook", None)) is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(old)
        add_hook_to_module(new, hook)
    model.set_submodule(name, new)


def _num_parameters(model, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """``PreTrainedModel.num_parameters``; a 4-bit weight counts as the matrix that it stands for."""
    modules = list(model.modules())
    packed = {
        id(m.weight): m.weight4bit.shape.numel() for m in modules if isinstance(m, Linear4bit)
    }
    embeddings = {id(m.weight) for m in modules if isinstance(m, nn.Embedding)}
    return sum(
        packed.get(id(p), p.numel())
        for p in model.parameters()
        if (p.requires_grad or not only_trainable)
        and not (exclude_embeddings and id(p) in embeddings)
    )


auto.register_quantization_config(METHOD)(LowRankConfig)
auto.register_quantizer(METHOD)(LowRankQuantizer)
