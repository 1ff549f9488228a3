"""The config.json of a checkpoint that ``quantize`` writes, by which transformers loads it."""

from __future__ import annotations

from ..codebooks import BITSANDBYTES_CODES, DTYPES
from .checkpoint import Source
from .layers import Plan


def config_of(source: Source, plan: Plan, options) -> dict:
    """The source's config.json with what BitsAndBytesConfig writes, or LowRankConfig.

    That is for what transformers would not load with bitsandbytes: experts, and a code of ours alone.
    """
    config = dict(source.config)
    field = "torch_dtype" if "torch_dtype" in config else "dtype"
    if options.dtype:
        config[field] = options.dtype
    if plan.stacks or options.quant_type not in BITSANDBYTES_CODES:
        config["quantization_config"] = {
            "quant_method": "lowrank_kernels",
            "quant_type": options.quant_type,
            "blocksize": options.blocksize,
            "double_quant": options.double_quant,
            "quant_storage": options.quant_storage,
            "skip_modules": plan.dense,
            "save_as": "lowrank_kernels",
        }
        return config
    first = next(iter(plan.quantized))
    stored = options.stored(source.entries[first], plan)
    compute = config.get(field)
    config["quantization_config"] = {  # it has no blocksize: quant states do
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute
        if isinstance(compute, str) and compute in DTYPES
        else str(stored).removeprefix("torch."),
        "bnb_4bit_quant_storage": options.quant_storage,
        "bnb_4bit_quant_type": options.quant_type,
        "bnb_4bit_use_double_quant": options.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": plan.dense,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
    return config
