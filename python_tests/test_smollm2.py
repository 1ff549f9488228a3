"""A real model, SmolLM2-135M-Instruct: perplexity, fine-tuning, adapter files, generation."""

from __future__ import annotations

import copy
import importlib.util
import math

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.cli import corpus, models

if models.smollm2_file() is None:
    pytest.skip(f"the model is not installed: {models.INSTALL_MODEL}", allow_module_level=True)
for package in ("transformers", "accelerate", "gguf"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"reading the model needs {package}", allow_module_level=True)

TEXT = 320  # tokens of which the perplexity is taken


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer, _ = models.load()
    return model, tokenizer


@pytest.fixture(scope="module")
def base(loaded) -> nn.Module:
    """The dense model; tests copy it."""
    return loaded[0]


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]


def quantized(base: nn.Module) -> tuple[nn.Module, object]:
    model = copy.deepcopy(base)
    return model, lk.replace_linear(model, r=16, lora_alpha=32, progress=False)


@torch.no_grad()
def perplexity(model: nn.Module, ids: torch.Tensor) -> float:
    logits = model.eval()(input_ids=ids, use_cache=False).logits[0, :-1].double()
    return math.exp(nn.functional.cross_entropy(logits, ids[0, 1:]))


def test_perplexity_is_that_of_the_dequantized_model(base, tokenizer):
    bnb = pytest.importorskip("bitsandbytes", reason="the oracle is bitsandbytes")
    model, _ = quantized(base)
    oracle = copy.deepcopy(base)
    for name, layer in model.named_modules():
        if isinstance(layer, lk.LoRALinear4bit):
            entries = layer.weight4bit.to_bitsandbytes("weight")
            packed = entries.pop("weight")
            state = {key.removeprefix("weight."): value for key, value in entries.items()}
            state = bnb.functional.QuantState.from_dict(state, torch.device("cpu"))
            dense = bnb.functional.dequantize_4bit(packed, state)
            oracle.get_submodule(name).weight.data = dense
    text = " ".join(f"{row['prompt']} {row['response']}" for row in corpus.load()[0])
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :TEXT]
    assert ids.shape[1] == TEXT
    expected = perplexity(oracle, ids)
    assert perplexity(model, ids) == pytest.approx(expected, rel=1e-4)
    # and quantization costs what it should: little, but not nothing
    assert 1.0 < expected / perplexity(base, ids) < 2.0


def test_report_totals(base):
    dense = {
        name: m
        for name, m in base.named_modules()
        if isinstance(m, nn.Linear) and name != "lm_head"
    }
    elements = sum(m.weight.numel() for m in dense.values())
    model, report = quantized(base)
    assert {layer.name for layer in report.replaced} == set(dense)
    assert [layer.name for layer in report.skipped] == ["lm_head"]
    assert report.bytes_before == 4 * elements
    # 4.127 bits per weight and the code tables of each layer
    assert 4.12 < 8 * report.bytes_after / elements < 4.35
    adapters = sum(16 * (m.in_features + m.out_features) for m in dense.values())
    assert report.adapter_bytes == 4 * adapters
    assert adapters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.lm_head.weight is model.get_input_embeddings().weight, "still tied"


def test_fine_tune_save_reload(base, tokenizer, tmp_path):
    torch.manual_seed(0)
    model, _ = quantized(base)
    batch = corpus.batch(tokenizer, corpus.load()[0][:2])
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    losses = []
    for _ in range(5):
        loss = model.train()(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses

    lk.save_adapter(model, tmp_path)
    fresh, _ = quantized(base)
    lk.load_adapter(fresh, tmp_path)
    ids = batch["input_ids"][:1]
    with torch.no_grad():
        expected, got = (m.eval()(input_ids=ids).logits for m in (model, fresh))
    assert torch.equal(got, expected)


def test_generation_with_and_without_cache(base, tokenizer):
    model, _ = quantized(base)
    ids = torch.tensor([corpus.prompt_ids(tokenizer, "What is the capital of France?")])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    options["attention_mask"] = torch.ones_like(ids)
    cached, plain = (
        model.eval().generate(input_ids=ids, use_cache=cache, **options) for cache in (True, False)
    )
    assert torch.equal(cached, plain)
    assert "Paris" in tokenizer.decode(cached[0, ids.shape[1] :])
