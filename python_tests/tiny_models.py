"""Tiny random transformers models of several architectures, saved to folders."""

from __future__ import annotations

import pathlib

import torch
import transformers

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
