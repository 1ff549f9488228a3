"""The Python blocks of peft.md run."""

from __future__ import annotations

import lowrank_kernels as lk
import markdown_blocks
import tiny_llama
from peft_models import layers


def test_peft(tmp_path, monkeypatch):
    folder = tiny_llama.save(tmp_path / "llama", [markdown_blocks.read("docs/peft.md")])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    names = markdown_blocks.run(
        "docs/peft.md", {"model": model, "tokenizer": AutoTokenizer.from_pretrained(folder)}
    )
    assert len(layers(names["model"])) == 14 and names["answers"].shape[0] == 3
    assert (tmp_path / "adapters/french/adapter_model.safetensors").exists()
    layer = next(layer for layer in layers(names["model"]) if "french" in layer.lora_A)
    assert layer.lora_B["french"].weight.grad.any() and not layer.merged
    plain = names["model"].merge_and_unload()
    assert sum(type(module) is lk.Linear4bit for module in plain.modules()) == 14
