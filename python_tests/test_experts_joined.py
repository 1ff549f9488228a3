"""Checkpoints with a matrix in 4 bits for every expert, as bitsandbytes made them of models without stacks."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank_kernels as lk
from lowrank_kernels.pieces import join

transformers = pytest.importorskip("transformers", reason="the experts are those of its models")

from tiny_experts import dense, logits, stacks  # noqa: E402 (needs transformers)

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "jamba")


def load(path, **arguments):
    return transformers.AutoModelForCausalLM.from_pretrained(path, **arguments).eval()


def saved(name, folder, change=lambda tensors: None, **settings):
    """The checkpoint's folder, and a model with its values, all dense."""
    dense(name).save_pretrained(folder)
    values = load_file(folder / "model.safetensors")
    matrices = [key for key in values if ".experts." in key]
    assert len(matrices) >= 12 and all(values[key].dim() == 2 for key in matrices)
    tensors = dict(values)
    for key in matrices:
        w = lk.quantize_4bit(values[key], **settings)
        values[key] = w.dequantize()
        tensors |= {k: t.clone() for k, t in w.to_bitsandbytes(key).items()}
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    twin = load(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder, twin


def loaded(folder):
    return load(folder, config=lk.pretrained_config(folder))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"quant_type": "fp4", "double_quant": False}])
def test_every_value_stays(name, settings, tmp_path):
    folder, twin = saved(name, tmp_path / "old", **settings)
    model = loaded(folder)
    assert stacks(model)
    for key, stack in stacks(model).items():
        assert torch.equal(stack.dequantize(), twin.get_parameter(key).detach())
        assert stack.weight4bit.quant_type == settings.get("quant_type", "nf4")
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "new")
    again = load(tmp_path / "new")
    assert stacks(again).keys() == stacks(model).keys()
    assert torch.equal(logits(again), logits(model))


def test_dense_matrices_stay_dense(tmp_path):
    def without(tensors):
        values = load_file(tmp_path / "model.safetensors")
        tensors.clear()
        tensors |= values

    folder, twin = saved("mixtral", tmp_path, without)
    model = loaded(folder)
    assert not stacks(model) and torch.equal(logits(model), logits(twin))


def missing(tensors):
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight.absmax"]


def one_dense(tensors):
    key = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    for name in [k for k in tensors if k.startswith(f"{key}.")]:
        del tensors[name]
    tensors[key] = torch.zeros(64, 64)


def of_another_shape(tensors):
    key = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors |= lk.quantize_4bit(torch.randn(32, 128)).to_bitsandbytes(key)


def of_another_blocksize(tensors):
    key = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors |= lk.quantize_4bit(torch.randn(64, 64), blocksize=128).to_bitsandbytes(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, r"gate_up_proj: expected all experts in 4 bits or none, got entries of \[3, 4\]"),
        (one_dense, r"gate_up_proj: expected all experts in 4 bits or none, got entries of"),
        (of_another_shape, r"experts.2.w3.weight: expected shape \(64, 64\), got \(32, 128\)"),
        (of_another_blocksize, "gate_up_proj: weights: expected the settings of the first"),
    ],
)
def test_damaged_checkpoints_name_the_parameter(change, message, tmp_path, caplog):
    folder, _ = saved("mixtral", tmp_path, change)
    transformers.logging.enable_propagation()
    try:
        with pytest.raises(RuntimeError):  # transformers', which logs the reasons
            loaded(folder)
    finally:
        transformers.logging.disable_propagation()
    words = " ".join(caplog.text.split())
    assert re.search(message, words), words


def test_join_keeps_values():
    for double_quant, storage in ((True, torch.uint8), (False, torch.bfloat16)):
        weights = [
            lk.quantize_4bit(torch.randn(6, 64), "int4", 32, double_quant, storage)
            for _ in range(3)
        ]
        w = join(weights, (3, 6, 64))
        w.validate()
        assert w.packed.dtype == storage
        assert torch.equal(w.dequantize(), torch.stack([part.dequantize() for part in weights]))
        assert torch.equal(join(weights, (18, 64)).dequantize(), w.dequantize().flatten(0, 1))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 48), (2, 48)], r"weights: expected whole blocks of 64 elements, got shape \(2, 48\)"),
        ([(2, 64)], r"weights: expected the elements of shape \(2, 2, 64\), got 1 of shapes"),
    ],
)
def test_what_cannot_be_joined(shapes, message):
    with pytest.raises(ValueError, match=message):
        join([lk.quantize_4bit(torch.randn(*shape)) for shape in shapes], (2, 2, 64))
