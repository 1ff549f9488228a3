"""``save_pretrained`` of a model with 4-bit layers, whoever made them: ``config.json`` says what the tensors are."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..experts import GroupedLinear4bit
from ..frozen4bit import Frozen4bit
from ..linear4bit import Linear4bit
from ..nn import LoRALinear4bit
from .transformers_adapters import adapters_of
from .transformers_config import LowRankConfig
from .transformers_load import reverts


def install(modeling_utils) -> None:
    """When transformers.modeling_utils has been imported."""
    cls = modeling_utils.PreTrainedModel
    save, count = cls.save_pretrained, cls.num_parameters
    if getattr(save, "_of_lowrank_kernels", False):
        return

    @functools.wraps(save)
    def save_pretrained(self, *args, **kwargs):
        describe(self)
        return save(self, *args, **kwargs)

    @functools.wraps(count)
    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        if any(isinstance(module, Frozen4bit) for module in self.modules()):
            return _num_parameters(self, only_trainable, exclude_embeddings)
        return count(self, only_trainable, exclude_embeddings)

    resize = cls._get_resized_lm_head

    @functools.wraps(resize)
    def _get_resized_lm_head(self, old_lm_head, new_num_tokens=None, *args, **kwargs):
        if isinstance(old_lm_head, Linear4bit) and new_num_tokens is not None:
            old_lm_head = _dense_head(old_lm_head, new_num_tokens)
        return resize(self, old_lm_head, new_num_tokens, *args, **kwargs)

    save_pretrained._of_lowrank_kernels = True
    cls.save_pretrained, cls.num_parameters = save_pretrained, num_parameters
    cls._get_resized_lm_head = _get_resized_lm_head


def _dense_head(head: Linear4bit, rows: int) -> nn.Linear:
    """Output embeddings in 4 bits as dense ones, which can be resized: the new rows have to be trained anyway."""
    if rows == head.out_features:
        return head
    if isinstance(head, LoRALinear4bit):
        raise ValueError(
            f"resize_token_embeddings: the output embeddings are a LoRALinear4bit with adapters {list(head.r)} for "
            f"{head.out_features} tokens; leave them dense (replace_linear's exclude_modules), or resize first"
        )
    warnings.warn(
        f"resize_token_embeddings: the output embeddings are a Linear4bit of {head.out_features} rows; the resized "
        "ones are a dense torch.nn.Linear with its values",
        stacklevel=3,
    )
    dense = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(head.dequantize(), requires_grad=False)
    dense.bias = head.bias
    return dense.train(head.training)


def _num_parameters(model: nn.Module, only_trainable: bool, exclude_embeddings: bool) -> int:
    """A 4-bit weight counts as the matrix that it stands for."""
    modules = list(model.modules())
    packed = {
        id(m.weight): m.weight4bit.shape.numel() for m in modules if isinstance(m, Frozen4bit)
    }
    embeddings = {id(m.weight) for m in modules if isinstance(m, nn.Embedding)}
    return sum(
        packed.get(id(p), p.numel())
        for p in model.parameters()
        if (p.requires_grad or not only_trainable)
        and not (exclude_embeddings and id(p) in embeddings)
    )


def describe(model: nn.Module) -> None:
    """Puts into ``model.config`` what from_pretrained has to know of the model's 4-bit layers, if it has any.

    Raises ValueError if another library's quantization_config is there or a stack of experts has adapters,
    RuntimeError for a merged adapter.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    stacks = {n: m for n, m in model.named_modules() if isinstance(m, GroupedLinear4bit)}
    if not (layers or stacks) or getattr(
        model, "_hf_peft_config_loaded", False
    ):  # PEFT saves the adapter alone
        return
    for name, stack in stacks.items():
        if stack.r:
            raise ValueError(
                f"save_pretrained: {name} has adapters {list(stack.r)}, which a checkpoint of the whole model has no "
                "place for; use save_adapter, and delete_adapter before the model is saved"
            )
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        first = next(iter((layers | stacks).values()))
        dense = [n for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)]
        config = LowRankConfig(
            first.quant_type,
            first.blocksize,
            first.double_quant,
            first.weight.dtype,
            skip_modules=[f"{re.escape(name)}$" for name in dense if ".lora_" not in name],
        )
        _forget_conversions(model, [*(f"{name}.weight" for name in layers), *stacks])
    elif not isinstance(config, LowRankConfig):
        raise ValueError(
            f"save_pretrained: {next(iter(layers | stacks))} is in 4 bits of lowrank_kernels in a model with a "
            f"quantization_config of type {type(config).__name__}, and a checkpoint has one; save "
            "model.state_dict() instead"
        )
    config.adapters = adapters_of(layers) or None
    model.config.quantization_config = config


def _forget_conversions(model: nn.Module, names: Iterable[str]) -> None:
    """transformers undoes its conversions as it saves, which packed bytes do not survive: see transformers_load."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # as transformers takes them for a model that it did not load
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [c for c in conversions if not isinstance(c, PrefixChange)]
    model._weight_conversions = [c for c in conversions if reverts(c, names)]
