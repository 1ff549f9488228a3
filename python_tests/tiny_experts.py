"""Small models of transformers whose experts are stacked, with dense twins of the same values."""

from __future__ import annotations

import copy
import functools
import json
import pathlib

import torch
import transformers
from safetensors.torch import load_file, save_file

import lowrank_kernels as lk

_SIZES = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
_DEEPSEEK = {
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONFIGS = {
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_SIZES, intermediate_size=128, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **_SIZES, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**_SIZES, "num_key_value_heads": 4}, **_DEEPSEEK, intermediate_size=128, moe_intermediate_size=64,
        n_routed_experts=8, num_experts_per_tok=2,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_SIZES, intermediate_size=64, head_dim=16, num_local_experts=4, num_experts_per_tok=2
    ),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(
        **_SIZES, intermediate_size=128, moe_intermediate_size=64, n_routed_experts=8, num_experts_per_tok=2,
        first_k_dense_replace=1, n_group=1, topk_group=1, head_dim=16,
    ),
    "olmoe": lambda: transformers.OlmoeConfig(
        **_SIZES, intermediate_size=64, num_experts=4, num_experts_per_tok=2
    ),
    "gemma4": lambda: transformers.Gemma4TextConfig(
        **_SIZES, intermediate_size=128, head_dim=16, global_head_dim=16, enable_moe_block=True, num_experts=4,
        top_k_experts=2, moe_intermediate_size=64, hidden_size_per_layer_input=0, num_kv_shared_layers=0,
        vocab_size_per_layer_input=96,
    ),
    "jamba": lambda: transformers.JambaConfig(
        **_SIZES, intermediate_size=64, num_experts=4, num_experts_per_tok=2, expert_layer_period=2,
        expert_layer_offset=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=8,
    ),
    "nemotron_h": lambda: transformers.NemotronHConfig(
        **_SIZES, layers_block_type=["moe", "attention"], head_dim=16, intermediate_size=64, moe_intermediate_size=64,
        n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_shared_expert_intermediate_size=64,
        moe_latent_size=None, n_group=1, topk_group=1, mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=16,
    ),
}  # fmt: skip
TOKENS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(0))


@functools.cache
def _dense(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # so that an expert, a gate and a bias matter
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def dense(name: str) -> torch.nn.Module:
    return copy.deepcopy(_dense(name))


def twin_of(model: torch.nn.Module, original: torch.nn.Module) -> torch.nn.Module:
    """``original`` with the values of the 4-bit weights of ``model``, all of it dense."""
    twin = copy.deepcopy(original)
    for path, module in model.named_modules():
        if isinstance(module, lk.Experts4bit):
            twin.set_submodule(path, module.dequantized(torch.float32))
        elif isinstance(module, lk.Linear4bit):
            twin.get_submodule(path).weight.data.copy_(module.dequantize(torch.float32))
    return twin


def pair(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model in 4 bits without adapters, and its dense twin."""
    model = dense(name)
    lk.replace_linear(model, r=0, progress=False)
    return model, twin_of(model, dense(name))


def stacks(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {
        f"{path}.{key}": stack
        for path, module in model.named_modules()
        if isinstance(module, lk.Experts4bit)
        for key, stack in module.stacks.items()
    }


def logits(model: torch.nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def mxfp4(
    E: int, N: int, K: int, low: int = 110, high: int = 130
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks and scales of a stack."""
    g = torch.Generator().manual_seed(E * N + K)
    blocks = torch.randint(0, 256, (E, N, K // 32, 16), dtype=torch.uint8, generator=g)
    return blocks, torch.randint(low, high, (E, N, K // 32), dtype=torch.uint8, generator=g)


def mxfp4_by_transformers(
    blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """[E, K, N], as GPT-OSS's class has it."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=dtype)


def save_gpt_oss(folder: pathlib.Path) -> torch.nn.Module:
    """A GPT-OSS as it is published, its experts in MXFP4; its twin, dequantized by transformers to float32."""
    dense("gpt_oss").save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors, twin = load_file(path), dense("gpt_oss")
    for key in [k for k in tensors if k.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        E, K, N = tensors.pop(key).shape
        blocks, scales = mxfp4(E, N, K, 120, 126)
        tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        twin.get_parameter(key).data.copy_(mxfp4_by_transformers(blocks, scales, torch.float32))
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return twin


def randomize(model, seed=0, words="lora_"):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if words in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def adapted(name, parameters, r=4, adapter="default", seed=0):
    model = dense(name)
    lk.replace_linear(
        model, r=r, lora_alpha=8, adapter_name=adapter, target_parameters=parameters, progress=False
    )
    return randomize(model, seed)
