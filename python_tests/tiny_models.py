"""Tiny random transformers models of several architectures, saved to folders."""

from __future__ import annotations

import pathlib

import pytest
import torch
import transformers

import lowrank_kernels as lk

# Rows are whole blocks: bitsandbytes 0.50.2 decodes a block that crosses rows wrongly on the CPU.
COMMON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = COMMON | {"vocab_size": 99, "intermediate_size": 128}
# Name -> (class that loads it, config).
MODELS = {
    "llama": ("CausalLM", transformers.LlamaConfig(**DECODER, num_key_value_heads=2)),
    "tied": ("CausalLM", transformers.LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "neox": ("CausalLM", transformers.GPTNeoXConfig(**DECODER)),  # biases
    "gpt2": ("CausalLM", transformers.GPT2Config(
        vocab_size=99, n_positions=64, n_embd=64, n_layer=2, n_head=4)),  # Conv1D
    "mixtral": ("CausalLM", transformers.MixtralConfig(
        **DECODER, num_key_value_heads=2, num_local_experts=3)),
    "hrm": ("CausalLM", transformers.HrmTextConfig(  # its files join what the model has apart
        **DECODER, head_dim=16, num_key_value_heads=4)),
    "bert": ("MaskedLM", transformers.BertConfig(**DECODER)),
    "t5": ("Seq2SeqLM", transformers.T5Config(
        vocab_size=99, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)),
}  # fmt: skip
TOKENS = torch.arange(24).reshape(2, 12)


def auto(name: str):
    return getattr(transformers, f"AutoModelFor{MODELS[name][0]}")


def save(name: str, folder: pathlib.Path, dtype: torch.dtype = torch.bfloat16) -> pathlib.Path:
    torch.manual_seed(0)
    model = auto(name).from_config(MODELS[name][1]).to(dtype)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):  # zero as they are made; a mistake would not show
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model) -> torch.Tensor:
    inputs = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    return model(TOKENS, **inputs).logits


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The folder of one of tiny_models' models."""
    folders: dict[str, pathlib.Path] = {}

    def folder(name: str) -> pathlib.Path:
        if name not in folders:
            folders[name] = save(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return folder


def load(folder, name: str = "llama", config: lk.LowRankConfig | None = None, **kwargs):
    kwargs.setdefault("dtype", "auto")
    return auto(name).from_pretrained(
        folder, quantization_config=config or lk.LowRankConfig(), **kwargs
    )


def layers(model, kind=lk.Linear4bit) -> dict[str, torch.nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, kind)}
