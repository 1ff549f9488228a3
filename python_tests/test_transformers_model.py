"""A model that transformers quantized with LowRankConfig, in a user's hands: moved, saved, trained."""

from __future__ import annotations

import copy
import json
import pickle
import sys

import pytest
import torch

import lowrank_kernels as lk

transformers = pytest.importorskip("transformers", reason="an optional dependency")
pytest.importorskip("accelerate", reason="transformers needs it for device maps")
bnb = pytest.importorskip("bitsandbytes", reason="it loads what is saved for it")

from transformers.pytorch_utils import Conv1D  # noqa: E402

import tiny_models  # noqa: E402
from tiny_models import auto, layers, load, logits  # noqa: E402

dense = tiny_models.dense

# -- the model -------------------------------------------------------------------------------------


def test_what_a_user_asks_of_a_model(dense, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # not installed
    model = load(dense("llama"), dtype=torch.float32)
    assert model.is_quantized and model.is_loaded_in_4bit
    assert model.get_memory_footprint() == sum(
        t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]
    )
    trainable = model.num_parameters(only_trainable=True)
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for cast in (model.half, model.float):
        with pytest.raises(ValueError, match="not supported for quantized model"):
            cast()
    want = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), want)
        assert copied.hf_quantizer.model is copied
        assert copied.num_parameters() == model.num_parameters()
    assert model.generate(tiny_models.TOKENS[:, :4], max_new_tokens=3, do_sample=False).shape == (
        2,
        7,
    )
    packed = {name: layer.weight.clone() for name, layer in layers(model).items()}
    assert model.to(torch.bfloat16) is model and logits(model).dtype == torch.bfloat16
    for name, layer in layers(model).items():
        assert torch.equal(layer.weight, packed[name])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_dequantize(dense, name, tmp_path):
    model = load(dense(name), name, dtype=torch.float32)
    want, quantized = logits(model), layers(model)
    weights = {name: layer.dequantize() for name, layer in quantized.items()}
    assert model.dequantize() is model and not layers(model)
    for key, weight in weights.items():
        layer = model.get_submodule(key)
        assert type(layer) is (Conv1D if name == "gpt2" else torch.nn.Linear)
        assert torch.equal(layer.weight, weight.T if name == "gpt2" else weight)
    torch.testing.assert_close(logits(model), want)
    assert not model.is_quantized and not hasattr(model, "is_loaded_in_4bit")
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)  # loads in any installation of transformers
    assert torch.equal(logits(auto(name).from_pretrained(tmp_path)), logits(model))
    assert model.half() is model


@pytest.mark.parametrize(
    "device_map", [None, "cpu", "auto", {"": "cpu"}, {"": torch.device("cpu")}]
)
def test_device_maps(dense, device_map):
    model = load(dense("llama"), device_map=device_map, low_cpu_mem_usage=True)
    if not torch.cuda.is_available():
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert torch.equal(logits(model), logits(load(dense("llama"))))


def test_offloading_is_refused(dense, tmp_path):
    for other in ("disk", 0):
        device_map = {"model": "cpu", "lm_head": other}
        with pytest.raises(ValueError, match="device_map: expected all modules on GPUs, or all"):
            load(dense("llama"), device_map=device_map, offload_folder=tmp_path)


def test_sharded_files(dense, tmp_path):
    model = load(dense("mixtral"), "mixtral")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert torch.equal(logits(again), logits(model))


# -- saving for bitsandbytes -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "neox", "gpt2", "bert"])
def test_save_as_bitsandbytes(dense, name, tmp_path):
    """Stock transformers and bitsandbytes load it, without a word of ours."""
    parts = {"llama": "layers.0", "neox": "layers.0", "gpt2": "h.0", "bert": "cls"}
    head = "cls" if name == "bert" else "lm_head"
    config = lk.LowRankConfig(skip_modules=[head, parts[name]], save_as="bitsandbytes")
    model = load(dense(name), name, config)
    assert config.bitsandbytes is None, "the user's object is as it was"
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "bitsandbytes" and saved["bnb_4bit_compute_dtype"] == "bfloat16"
    theirs = auto(name).from_pretrained(tmp_path, dtype="auto")
    linears = layers(theirs, bnb.nn.Linear4bit)
    assert linears.keys() == layers(model).keys()
    for key, layer in linears.items():
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(weight, model.get_submodule(key).dequantize()), key


# -- training --------------------------------------------------------------------------------------


def step(model, optimizer) -> float:
    loss = model(tiny_models.TOKENS, labels=tiny_models.TOKENS).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def test_replace_linear_on_a_loaded_model(dense, tmp_path):
    model = load(dense("llama"), dtype=torch.float32)
    bytes_before = {name: layer.weight.clone() for name, layer in layers(model).items()}
    assert not model.hf_quantizer.is_qat_trainable
    report = lk.replace_linear(model, r=4, progress=False)
    assert len(report.replaced) == 14 and model.hf_quantizer.is_qat_trainable
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = [step(model, optimizer) for _ in range(4)]
    assert losses[-1] < losses[0]
    for name, layer in layers(model, lk.LoRALinear4bit).items():
        assert torch.equal(layer.weight, bytes_before[name])
    lk.save_adapter(model, tmp_path)
    other = load(dense("llama"), dtype=torch.float32)
    lk.replace_linear(other, r=4, progress=False)
    lk.load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(ValueError, match=r"dequantize: model\.layers\.0.*without adapters"):
        model.dequantize()


@pytest.mark.slow
def test_trainer(dense, tmp_path):
    """Trainer refuses a 4-bit model without adapters, and takes one with ours."""
    data = [{"input_ids": row, "labels": row} for row in tiny_models.TOKENS]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        report_to=[],
        use_cpu=True,
        learning_rate=1e-2,
        save_strategy="no",
    )
    model = load(dense("llama"), dtype=torch.float32)
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model, arguments, train_dataset=data)
    lk.replace_linear(model, r=4, progress=False)
    result = transformers.Trainer(model, arguments, train_dataset=data).train()
    assert result.global_step == 2
    assert any(layer.lora_B["default"].weight.any() for layer in layers(model).values())


def test_peft_prepares_counts_and_saves_only_the_adapter(dense, tmp_path):
    peft = pytest.importorskip("peft", reason="an optional dependency")
    model = load(dense("llama"), config=lk.LowRankConfig(quant_storage="bfloat16"))
    total = model.num_parameters()
    model = peft.prepare_model_for_kbit_training(model)
    assert model.is_gradient_checkpointing and model.lm_head.weight.dtype == torch.float32
    assert all(layer.weight.dtype == torch.bfloat16 for layer in layers(model).values())
    model.add_adapter(peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not (tmp_path / "model.safetensors").exists()
    assert model.num_parameters() - model.num_parameters(only_trainable=True) == total
    other = load(dense("llama"), config=lk.LowRankConfig(quant_storage="bfloat16"))
    other = peft.prepare_model_for_kbit_training(other)
    other.load_adapter(str(tmp_path))
    assert torch.equal(logits(other.eval()), logits(model.eval()))


def test_an_adapter_whose_base_is_quantized(dense, tmp_path):
    """from_pretrained on an adapter's folder loads the base that it names, with its config, then the adapter."""
    peft = pytest.importorskip("peft", reason="an optional dependency")
    base = load(dense("llama"))
    base.save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    model.add_adapter(peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype="auto")
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(base))
