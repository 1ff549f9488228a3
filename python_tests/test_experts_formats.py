"""Stacks in the forms of others: MXFP4 checkpoints, and what bitsandbytes writes for 3-D parameters."""

from __future__ import annotations

import contextlib
import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank_kernels as lk

transformers = pytest.importorskip("transformers", reason="the experts are those of its models")

from tiny_experts import (  # noqa: E402 (needs transformers)
    dense,
    logits,
    mxfp4,
    mxfp4_by_transformers,
    save_gpt_oss,
    stacks,
    twin_of,
)

pytestmark = pytest.mark.filterwarnings("ignore")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


# -- the format --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exponents", [(110, 130), (0, 4), (1, 128), (240, 253)])
def test_mxfp4_has_the_values_of_transformers(dtype, exponents):
    blocks, scales = mxfp4(3, 64, 128, *exponents)
    w = lk.Weight4bit.from_mxfp4(blocks, scales, dtype)
    w.validate()
    expected = mxfp4_by_transformers(blocks, scales, dtype).transpose(1, 2)
    assert w.shape == (3, 64, 128) and w.dtype == dtype and w.blocksize == 32
    assert torch.equal(w.dequantize(), expected)


def test_every_byte_of_mxfp4():
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    w = lk.Weight4bit.from_mxfp4(blocks, torch.full((1, 16), 127, dtype=torch.uint8))
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    pairs = torch.stack([values[torch.arange(256) % 16], values[torch.arange(256) // 16]], 1)
    assert torch.equal(w.dequantize(torch.float32), pairs.view(1, 512))


def test_mxfp4_keeps_its_bytes_in_bitsandbytes_form():
    w = lk.Weight4bit.from_mxfp4(*mxfp4(2, 32, 64))
    entries = w.to_bitsandbytes("down_proj")
    assert "down_proj.quant_state.bitsandbytes__mxfp4" in entries
    again = lk.Weight4bit.from_bitsandbytes(entries, "down_proj")
    assert again.quant_type == "mxfp4" and torch.equal(again.dequantize(), w.dequantize())


@pytest.mark.parametrize("M", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_mxfp4(M, dtype):
    w = lk.Weight4bit.from_mxfp4(*mxfp4(3, 64, 128), dtype)
    x = torch.randn(M, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    offsets = torch.tensor([0, M, M], dtype=torch.int32)
    expected = x.double() @ w.dequantize(torch.float32)[1].double().T
    bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype] * float(expected.abs().max())
    for exact in (True, False):
        with lk.batch_invariant() if exact else contextlib.nullcontext():
            y = lk.grouped_linear_4bit(x, w, offsets)
        assert float((y.double() - expected).abs().max()) <= bound


@pytest.mark.parametrize(
    "exponent, nibble, fits",
    [(253, 5, True), (253, 6, False), (253, 15, False), (254, 3, True), (254, 4, False), (254, 12, False)],
)  # fmt: skip
def test_the_largest_values_of_mxfp4(exponent, nibble, fits):
    for place in (nibble, nibble << 4):
        blocks = torch.zeros(1, 2, 16, dtype=torch.uint8)
        blocks[0, 1, 7] = place
        scales = torch.tensor([[127, exponent]], dtype=torch.uint8)
        if fits:
            assert lk.Weight4bit.from_mxfp4(blocks, scales).dequantize().isfinite().all()
        else:
            with pytest.raises(ValueError, match=r"scales: expected values below 2 \*\* 128"):
                lk.Weight4bit.from_mxfp4(blocks, scales)


def _with(change):
    blocks, scales = mxfp4(2, 32, 64)
    return change(blocks, scales)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda b, s: (b.int(), s), TypeError, "blocks: expected a uint8 tensor, got torch.int32"),
        (lambda b, s: (b, s.float()), TypeError, "scales: expected a uint8 tensor, got torch.float32"),
        (lambda b, s: (b, [1]), TypeError, r"scales: expected a uint8 tensor, got \[1\]"),
        (lambda b, s: (b[:, :, :1], s), ValueError, r"got \(2, 32, 1, 16\) and \(2, 32, 2\)"),
        (lambda b, s: (b[..., :8], s), ValueError, r"expected shapes \[N, K/32, 16\]"),
        (lambda b, s: (b, s.fill_(255)), ValueError, "got 255, which stands for NaN"),
        (lambda b, s: (b, s, torch.int8), TypeError, "dtype: expected float32"),
    ],
)  # fmt: skip
def test_what_is_no_mxfp4(change, error, message):
    with pytest.raises(error, match=message):
        lk.Weight4bit.from_mxfp4(*_with(change))


# -- GPT-OSS as it is published ------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path):
    twin = save_gpt_oss(tmp_path / "model")
    return tmp_path / "model", twin


def load(folder, **options):
    cls = transformers.AutoModelForCausalLM
    model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    return model.eval()


def test_gpt_oss_loads_as_it_is(published, tmp_path):
    folder, twin = published
    model = load(folder, config=lk.pretrained_config(folder), dtype=torch.float32)
    assert {stack.weight4bit.quant_type for stack in stacks(model).values()} == {"mxfp4"}
    assert len(stacks(model)) == 4 and not any(s.transposed for s in stacks(model).values())
    torch.testing.assert_close(logits(model), logits(twin), **CLOSE)
    for key, stack in stacks(model).items():
        expected = twin.get_parameter(key)
        assert torch.equal(stack.dequantize(torch.float32).transpose(1, 2), expected)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    dequantized = again.dequantize()
    for key in stacks(model):
        assert torch.equal(dequantized.get_parameter(key), twin.get_parameter(key)), key


def test_gpt_oss_in_mxfp4_gets_adapters(published):
    """The bytes of experts stay; the linear layers become 4 bits as well."""
    folder, twin = published
    model = load(folder, config=lk.pretrained_config(folder), dtype=torch.float32)
    before = {name: stack.weight.clone() for name, stack in stacks(model).items()}
    report = lk.replace_linear(
        model, r=4, target_parameters=["experts.gate_up_proj"], progress=False
    )
    lines = {layer.name: layer for layer in report.replaced}
    for name, stack in stacks(model).items():
        assert torch.equal(stack.weight, before[name])
        assert lines[name].bytes_before == lines[name].bytes_after > 0
        assert (lines[name].adapter_bytes > 0) == name.endswith("gate_up_proj")
    torch.testing.assert_close(logits(model), logits(twin_of_base(model, twin)), **CLOSE)
    logits(model).square().mean().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if ".lora_" in n
    }


def twin_of_base(model, twin):
    """Adapters are nothing yet: B is 0."""
    other = copy.deepcopy(twin)
    for name, layer in model.named_modules():
        if isinstance(layer, lk.Linear4bit):
            other.get_submodule(name).weight.data.copy_(layer.dequantize(torch.float32))
    return other


def test_a_scale_that_is_nan_names_the_parameter(published):
    folder, _ = published
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj_scales"][0, 0, 0] = 255
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="issues during automatic conversion of the weights"):
        load(folder, config=lk.pretrained_config(folder))


# -- bitsandbytes --------------------------------------------------------------------------------------


def parametrized(name: str, double_quant: bool, quant_type: str) -> tuple:
    """The experts of a layer by bitsandbytes, and dense."""
    reason = "bitsandbytes, the form's oracle, is not installed"
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize", reason=reason)
    experts = dense(name).model.layers[0].mlp.experts
    theirs = copy.deepcopy(experts)
    for key in ("gate_up_proj", "down_proj"):
        parametrize.replace_parameter_4bit(theirs, key, double_quant, quant_type, 64)
    return theirs, experts


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_state_dict_is_that_of_bitsandbytes(name, quant_type):
    theirs, experts = parametrized(name, False, quant_type)
    ours = lk.Experts4bit.from_experts(experts, quant_type, 64, False).state_dict()
    expected = theirs.state_dict()
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        assert ours[key].dtype == tensor.dtype and ours[key].shape == tensor.shape
        assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_what_bitsandbytes_wrote_loads_and_is_written_again(name, double_quant):
    theirs, experts = parametrized(name, double_quant, "nf4")
    entries = theirs.state_dict()
    for key in ("gate_up_proj", "down_proj"):
        own = {k: t for k, t in entries.items() if k == key or k.startswith(f"{key}.")}
        w = lk.Weight4bit.from_bitsandbytes(own, key)
        again = w.to_bitsandbytes(key)
        assert again.keys() == own.keys() and all(torch.equal(again[k], own[k]) for k in own)
        torch.testing.assert_close(w.dequantize(), getattr(theirs, key), rtol=0, atol=1e-6)
    module = lk.Experts4bit.from_experts(experts, double_quant=double_quant)
    module.load_state_dict(entries)
    saved = module.state_dict()
    assert all(torch.equal(saved[k], entries[k]) for k in entries)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_checkpoint_of_bitsandbytes_with_stacks(name, tmp_path):
    """transformers' own loader knows no such stacks; what is saved names lowrank_kernels therefore."""
    dense(name).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=lk.LowRankConfig())
    model.save_pretrained(tmp_path / "bnb")
    config = json.loads((tmp_path / "bnb/config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32",
    }  # fmt: skip
    (tmp_path / "bnb/config.json").write_text(json.dumps(config))
    again = load(tmp_path / "bnb", config=lk.pretrained_config(tmp_path / "bnb"))
    assert stacks(again).keys() == stacks(model).keys() and stacks(again)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_stacks_that_stayed_dense_for_bitsandbytes(tmp_path):
    pytest.importorskip("bitsandbytes", reason="loads the checkpoint")
    dense("qwen3_moe").save_pretrained(tmp_path / "dense")
    config = lk.LowRankConfig(save_as="bitsandbytes")
    model = load(tmp_path / "dense", quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", config=lk.pretrained_config(tmp_path / "saved"))
    assert not stacks(again) and torch.equal(logits(again), logits(model))
    theirs = load(tmp_path / "saved").train()
    torch.testing.assert_close(logits(theirs), logits(model), **CLOSE)


def test_twins_have_the_values_of_4_bits():
    """The helper of these tests itself: dense weights of a twin are the dequantized ones."""
    model = dense("qwen3_moe")
    lk.replace_linear(model, r=0, progress=False)
    twin = twin_of(model, dense("qwen3_moe"))
    for key, stack in stacks(model).items():
        assert torch.equal(twin.get_parameter(key), stack.dequantize(torch.float32))
