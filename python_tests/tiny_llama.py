"""A Hugging Face model that is made in a moment: a random two-layer Llama whose tokenizer knows the words of a text."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

import pytest
import torch


def save(folder: pathlib.Path, texts: Iterable[str]) -> pathlib.Path:
    """Writes model and tokenizer to ``folder``, which is returned; skips the test without transformers."""
    transformers = pytest.importorskip("transformers", reason="a real model needs transformers")
    tokenizers = pytest.importorskip("tokenizers", reason="a real model needs tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=["<unk>", "<end>"])
    words.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<end>", pad_token="<end>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
