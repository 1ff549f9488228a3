"""Checkpoints that bitsandbytes wrote, loaded by this library and saved again byte for byte."""

from __future__ import annotations

import itertools
import json
import pathlib
import shutil

import pytest
import torch

import lowrank_kernels as lk

transformers = pytest.importorskip("transformers", reason="an optional dependency")
pytest.importorskip("accelerate", reason="transformers needs it for device maps")
bnb = pytest.importorskip("bitsandbytes", reason="it writes the checkpoints")
safetensors = pytest.importorskip("safetensors.torch")

import tiny_models  # noqa: E402
from tiny_models import auto, files, logits, save  # noqa: E402


def write(
    folder: pathlib.Path, name: str = "llama", shards: str = "1GB", dtype=torch.bfloat16, **settings
) -> pathlib.Path:
    """A checkpoint by bitsandbytes; ``settings``: those of BitsAndBytesConfig, without bnb_4bit_."""
    source = save(name, folder / "source", dtype)
    settings = {"quant_type": "nf4", "use_double_quant": True} | settings
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, **{f"bnb_4bit_{key}": value for key, value in settings.items()}
    )
    model = auto(name).from_pretrained(source, quantization_config=config, dtype="auto")
    model.save_pretrained(folder / "theirs", max_shard_size=shards)
    return folder / "theirs"


def load(folder: pathlib.Path, name: str = "llama", **kwargs):
    kwargs.setdefault("dtype", "auto")
    return auto(name).from_pretrained(folder, config=lk.pretrained_config(folder), **kwargs)


def dequantized_by_bitsandbytes(folder: pathlib.Path, name: str):
    """The model as bitsandbytes loads it, and its dense weights by layer."""
    model = auto(name).from_pretrained(folder, dtype="auto")
    weights = {
        key: bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state)
        for key, m in model.named_modules()
        if isinstance(m, bnb.nn.Linear4bit)
    }
    return model, weights


@torch.no_grad()
def check(folder: pathlib.Path, name: str, out: pathlib.Path) -> None:
    model = load(folder, name)
    theirs, weights = dequantized_by_bitsandbytes(folder, name)
    layers = {k: m for k, m in model.named_modules() if isinstance(m, lk.Linear4bit)}
    assert layers.keys() == weights.keys() != set()
    for key, weight in weights.items():
        assert torch.equal(layers[key].dequantize(), weight), key
        assert layers[key].dequantize().dtype == weight.dtype
    for key, parameter in theirs.named_parameters():
        if not isinstance(parameter, bnb.nn.Params4bit):
            assert torch.equal(model.get_parameter(key), parameter), key
    dense = load(folder, name).dequantize()
    for key, weight in weights.items():
        layer = dense.get_submodule(key)
        transposed = not isinstance(layer, torch.nn.Linear)  # Conv1D
        assert torch.equal(layer.weight, weight.T if transposed else weight)
    tolerance = 1e-5 if model.dtype == torch.float32 else 0.05
    torch.testing.assert_close(logits(model), logits(dense), rtol=tolerance, atol=tolerance)

    shards = "30KB" if (folder / "model.safetensors.index.json").exists() else "1GB"
    model.save_pretrained(out, max_shard_size=shards)
    assert files(out) == files(folder)
    for key, weight in dequantized_by_bitsandbytes(out, name)[1].items():
        assert torch.equal(weight, weights[key]), key


@pytest.mark.parametrize(
    ("quant_type", "double_quant", "storage"),
    [*itertools.product(["nf4", "fp4"], [True, False], ["uint8"]), ("nf4", True, "bfloat16"),
     ("fp4", False, "float32")],
)  # fmt: skip
def test_formats(tmp_path, quant_type, double_quant, storage):
    settings = {
        "quant_type": quant_type,
        "use_double_quant": double_quant,
        "quant_storage": storage,
    }
    check(write(tmp_path, dtype=torch.float32, **settings), "llama", tmp_path / "ours")


@pytest.mark.parametrize("name", ["neox", "gpt2", "tied", "mixtral", "bert", "t5"])
def test_architectures(tmp_path, name):
    check(write(tmp_path, name), name, tmp_path / "ours")


def test_shards(tmp_path):
    folder = write(tmp_path, shards="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    check(folder, "llama", tmp_path / "ours")


def rewrite(folder: pathlib.Path, change) -> None:
    """``change(tensors)`` in place on the tensors of a checkpoint."""
    path = folder / "model.safetensors"
    tensors = safetensors.load_file(path)
    change(tensors)
    safetensors.save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
def test_blocksizes(tmp_path, blocksize):
    """No config names it, so it cannot be had from transformers; the weights' own records do."""
    folder = write(tmp_path)
    original = safetensors.load_file(tmp_path / "source/model.safetensors")
    packed = {}

    def change(tensors):
        for key in [k for k in tensors if k.endswith("proj.weight")]:
            data, state = bnb.functional.quantize_4bit(
                original[key], blocksize=blocksize, compress_statistics=True, quant_type="nf4"
            )
            for entry in [k for k in tensors if k.startswith(f"{key}.")]:
                del tensors[entry]
            tensors[key] = packed[key] = data
            statistics = state.as_dict(packed=True)
            tensors.update({f"{key}.{k}": v.contiguous() for k, v in statistics.items()})

    rewrite(folder, change)
    model = load(folder)
    for key, data in packed.items():
        layer = model.get_submodule(key.removesuffix(".weight"))
        assert layer.blocksize == blocksize and torch.equal(layer.weight, data)
        error = (layer.dequantize() - original[key]).float().norm() / original[key].float().norm()
        assert error < 0.2
    assert logits(model).isfinite().all()
    model.save_pretrained(tmp_path / "ours")
    assert files(tmp_path / "ours") == files(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["neox", "bert"])
def test_dtype(tmp_path, name, dtype):
    """Everything dense has it, which transformers alone does not do; packed bytes are not touched."""
    folder = write(tmp_path, name, quant_storage="bfloat16")
    model, same = load(folder, name, dtype=dtype), load(folder, name)
    for key, parameter in model.named_parameters():
        other = same.get_parameter(key)
        if isinstance(model.get_submodule(key.rpartition(".")[0]), lk.Linear4bit) and key.endswith(
            "weight"
        ):
            assert torch.equal(parameter.view(torch.uint8), other.view(torch.uint8))
        else:
            assert parameter.dtype == dtype and torch.equal(parameter, other.to(dtype)), key
    assert logits(model).dtype == dtype
    torch.testing.assert_close(logits(model), logits(same).to(dtype), rtol=0.1, atol=0.1)


def test_a_config_that_names_no_method(tmp_path):
    """As in the files of bitsandbytes' first years."""
    folder = write(tmp_path)
    want = logits(load(folder))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load(folder)), want)
    model = load(folder)
    model.save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours/config.json").read_text())
    assert saved["quantization_config"] == config["quantization_config"]


def test_pretrained_config_takes_the_arguments_of_auto_config(tmp_path, monkeypatch):
    folder = write(tmp_path)
    config = lk.pretrained_config(folder, local_files_only=True, revision="main", hidden_act="gelu")
    assert config.hidden_act == "gelu"
    config, unused = lk.pretrained_config(
        folder, return_unused_kwargs=True, hidden_act="gelu", other=1
    )
    assert config.hidden_act == "gelu" and unused["other"] == 1
    parent = folder.parent
    shutil.copytree(folder, parent / "deep/er")
    config = lk.pretrained_config(parent / "deep", subfolder="er")
    assert config.quantization_config["quant_method"] == "lowrank_kernels"
    # Ours comes back as it is.
    source = folder.parent / "source"
    model = auto("llama").from_pretrained(
        source, quantization_config=lk.LowRankConfig(blocksize=32)
    )
    model.save_pretrained(tmp_path / "ours")
    section = lk.pretrained_config(tmp_path / "ours").quantization_config
    assert section == lk.LowRankConfig(blocksize=32).to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "expected a checkpoint with a quantization_config, got one without"),
        ({"load_in_8bit": True, "load_in_4bit": False}, "to 4 bits, got load_in_8bit True"),
        ({"load_in_4bit": False}, "to 4 bits, got load_in_4bit False"),
        ({"quant_method": "gptq"}, "got quant_method 'gptq'"),
        ({"bnb_4bit_quant_storage": "int8"}, "quant_storage: expected one of"),
        ({"bnb_4bit_quant_storage": "complex"}, "quantization_config: `bnb_4bit_quant_storage`"),
        ({"bnb_4bit_quant_type": "int4"}, "quant_type: expected one of .*, got 'int4'"),
        ({"bnb_4bit_compute_dtype": "nonsense"}, "quantization_config: .*nonsense"),
        ({"llm_int8_skip_modules": "lm_head"}, "quantization_config: llm_int8_skip_modules"),
    ],
)
def test_configs_that_are_refused(tmp_path, change, message):
    config = tiny_models.MODELS["llama"][1].to_dict()
    if change is not None:
        config["quantization_config"] = (
            transformers.BitsAndBytesConfig(load_in_4bit=True).to_dict() | change
        )
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        lk.pretrained_config(tmp_path)


KEY = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{KEY}.absmax"), f"{KEY}.absmax"),
        (lambda t: t.pop(f"{KEY}.quant_state.bitsandbytes__nf4"), f"{KEY}.quant_state"),
        (lambda t: t.update({f"{KEY}.absmax": t[f"{KEY}.absmax"][:-1]}), f"{KEY}.absmax"),
        (lambda t: t.update({KEY: t[KEY][:-1]}), KEY),
        (lambda t: t.pop(KEY), KEY),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith(f"{KEY}.")], KEY),
        (lambda t: t.update({k.replace("up_proj", "down_proj"): v.clone() for k, v in t.items() if KEY in k}),
         "model.layers.0.mlp.down_proj.weight"),
    ],
)  # fmt: skip
def test_broken_files_are_refused(tmp_path, change, message, caplog):
    folder = write(tmp_path)
    rewrite(folder, change)
    transformers.utils.logging.enable_propagation()
    try:
        with pytest.raises(RuntimeError):
            load(folder)
    finally:
        transformers.utils.logging.disable_propagation()
    assert message.replace("layers.0", "layers.{0}") in caplog.text or message in caplog.text
