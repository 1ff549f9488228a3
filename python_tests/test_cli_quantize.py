"""``quantize``: its bytes, who can load them, what interrupts it, and models that are not what they should be."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank_kernels as lk
import lowrank_kernels.cli as cli
import tiny_llama
from lowrank_kernels.cli import checkpoint, models

transformers = pytest.importorskip("transformers", reason="quantize builds models of transformers")

ROOT = pathlib.Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "lowrank_kernels", "quantize"]
IDS = torch.tensor([[1, 2, 3, 4, 5, 6]])


def quantize(*arguments: object) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["quantize", *map(str, arguments)])
    assert end.value.code == 0, end.value.code


def refused(*arguments: object) -> str:
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as end:
        cli.main(["quantize", *map(str, arguments)])
    assert isinstance(end.value.code, str), end.value.code
    assert len(end.value.code.splitlines()) == 1
    return end.value.code


def tensors_of(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    return {
        k: t for path in sorted(folder.glob("*.safetensors")) for k, t in load_file(path).items()
    }


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> pathlib.Path:
    folder = tiny_llama.save(tmp_path_factory.mktemp("models") / "llama", ["a b c d e f g"])
    # Rows in whole blocks: others bitsandbytes decodes wrongly on CPUs with AVX-512 (test_dequantize_4bit.py).
    config = transformers.LlamaConfig.from_pretrained(folder, intermediate_size=192)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (folder / "modeling_evil.py").write_text("raise SystemExit('this code must never run')")
    (folder / "LICENSE").write_text("mine")
    return folder


@pytest.fixture
def copied(llama, tmp_path) -> pathlib.Path:
    """The model, to be spoilt."""
    return pathlib.Path(shutil.copytree(llama, tmp_path / "copy"))


def edit(path: pathlib.Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def loaded(folder: pathlib.Path, **options: object) -> torch.nn.Module:
    """By transformers and, where config.json says so, bitsandbytes; nothing may be missing or left over."""
    pytest.importorskip("bitsandbytes", reason="the checkpoint is for bitsandbytes")
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    return model.train()  # bitsandbytes' inference on CPUs with AVX512_BF16 rounds to bfloat16


def ours(model: torch.nn.Module, folder: pathlib.Path) -> torch.nn.Module:
    """``model`` with Linear4bit in place of what was quantized, loaded by plain load_state_dict."""
    skipped = json.loads((folder / "config.json").read_text())["quantization_config"]
    lk.replace_linear(model, r=0, exclude_modules=skipped["llm_int8_skip_modules"], progress=False)
    keys = model.load_state_dict(tensors_of(folder), strict=False)
    assert not keys.unexpected_keys
    model.tie_weights()
    return model.train()


def by_bitsandbytes(layer: torch.nn.Module) -> torch.Tensor:
    """The dense weight, by bitsandbytes; it would compile its Python for large blocks."""
    import bitsandbytes as bnb

    with torch.compiler.set_stance("force_eager"):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def assert_same_weights(bnb_model: torch.nn.Module, our_model: torch.nn.Module) -> int:
    """How many layers are 4-bit in both; their dequantized weights are equal bit for bit."""
    import bitsandbytes as bnb

    count = 0
    for name, layer in bnb_model.named_modules():
        twin = our_model.get_submodule(name)
        assert isinstance(layer, bnb.nn.Linear4bit) == isinstance(twin, lk.Linear4bit), name
        if isinstance(layer, bnb.nn.Linear4bit):
            dense = by_bitsandbytes(layer)
            assert torch.equal(dense, twin.weight4bit.dequantize()), name
            count += 1
    return count


# -- the bytes, and who loads them -------------------------------------------------------------------

CHOICES = {
    "default": ((), dict()),
    "fp4, storage": (
        ("--quant-type", "fp4", "--no-double-quant", "--quant-storage", "bfloat16", "--dtype", "bfloat16"),
        dict(quant_type="fp4", double_quant=False, quant_storage=torch.bfloat16),
    ),
    # which BitsAndBytesConfig cannot say: quant states do
    "blocks of 32": (("--blocksize", "32"), dict(blocksize=32)),
    "blocks of 4096": (("--blocksize", "4096", "--dtype", "float16"), dict(blocksize=4096)),
}  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
def test_bytes_and_loaders(llama, tmp_path, choice):
    arguments, options = CHOICES[choice]
    out = tmp_path / "out"
    quantize(llama, out, *arguments)
    dtype = getattr(
        torch, arguments[arguments.index("--dtype") + 1] if "--dtype" in arguments else "float32"
    )
    expected = {}
    for key, tensor in tensors_of(llama).items():
        tensor = tensor.to(dtype)
        linear = key.endswith("_proj.weight")
        entries = (
            lk.quantize_4bit(tensor, **options).to_bitsandbytes(key) if linear else {key: tensor}
        )
        expected |= entries
    got = tensors_of(out)
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (got[key].dtype, got[key].shape) == (tensor.dtype, tensor.shape), key
        assert checkpoint.bytes_of(got[key]) == checkpoint.bytes_of(tensor), key
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_compute_dtype"] == str(dtype).removeprefix("torch.")
    assert config["llm_int8_skip_modules"] == ["lm_head"]

    theirs = loaded(out)
    mine = ours(transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=dtype), out)
    assert assert_same_weights(theirs, mine) == 14
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        a, b = theirs(IDS).logits, mine(IDS).logits
    assert (a - b).abs().max() <= 4 * torch.finfo(dtype).eps * a.abs().max()


def test_a_code_that_bitsandbytes_does_not_have(llama, tmp_path):
    """The same keys, but config.json names this library, which loads it."""
    quantize(llama, tmp_path / "out", "--quant-type", "int4", "--blocksize", "32")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    expected = lk.LowRankConfig("int4", 32, skip_modules=["lm_head"]).to_dict()
    assert config == expected
    got = tensors_of(tmp_path / "out")
    for key, tensor in tensors_of(llama).items():
        if key.endswith("_proj.weight"):
            entries = lk.quantize_4bit(tensor, "int4", 32).to_bitsandbytes(key)
            for name, part in entries.items():
                assert checkpoint.bytes_of(got[name]) == checkpoint.bytes_of(part), name
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    kinds = [m.quant_type for m in model.modules() if isinstance(m, lk.Linear4bit)]
    assert kinds == ["int4"] * 14


def test_config_is_what_bitsandbytes_writes(llama, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the oracle is bitsandbytes")
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        llama, dtype=torch.bfloat16, quantization_config=options
    )
    model.save_pretrained(tmp_path / "theirs")
    quantize(llama, tmp_path / "ours", "--dtype", "bfloat16")
    theirs, mine = (
        json.loads((tmp_path / n / "config.json").read_text()) for n in ("theirs", "ours")
    )
    assert mine == theirs
    shapes = [
        {
            k: (t.dtype, t.shape)
            for k, t in tensors_of(tmp_path / n).items()
            if "quant_state" not in k
        }
        for n in ("theirs", "ours")
    ]
    assert shapes[0] == shapes[1]


def test_small_files_go_along_and_code_does_not(llama, tmp_path, capsys):
    quantize(llama, tmp_path / "out", "--report", tmp_path / "report.json")
    copied = contents(tmp_path / "out")
    templates = "additional_chat_templates/tools.jinja"
    for name in ("tokenizer.json", "generation_config.json", "LICENSE", templates):
        assert copied[name] == (llama / name).read_bytes()
    assert not any(name.endswith(".py") or name.startswith(".") for name in copied)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("a b")["input_ids"]
    report = json.loads((tmp_path / "report.json").read_text())
    weight = tensors_of(llama)["model.layers.0.mlp.up_proj.weight"]
    row = next(row for row in report["quantized"] if row["name"] == "model.layers.0.mlp.up_proj")
    error = (lk.quantize_4bit(weight).dequantize() - weight).norm() / weight.norm()
    assert row["error"] == pytest.approx(float(error), rel=1e-5)
    assert row["bytes_before"] == 4 * weight.numel()
    assert report["skipped"] == [{"name": "lm_head", "reason": "in --exclude"}]
    out = capsys.readouterr().out
    for words in (
        "model.layers.1.self_attn.v_proj",
        "192 x 64",
        "14 layers",
        "lm_head  in --exclude",
    ):
        assert words in out


def test_code_that_a_configuration_names_is_not_fetched(copied, tmp_path):
    evil = dict.fromkeys(("attn_implementation", "_attn_implementation"), "evil/kernel")
    edit(copied / "config.json", **evil, auto_map={"AutoModelForCausalLM": "modeling_evil.Model"})
    quantize(copied, tmp_path / "out")
    assert "model.layers.0.mlp.up_proj.weight.absmax" in tensors_of(tmp_path / "out")


def test_quiet(llama, tmp_path, capsys):
    quantize(llama, tmp_path / "out", "--quiet")
    assert capsys.readouterr() == ("", "")


def test_targets_and_exclusions(llama, tmp_path):
    targets = ("--target-modules", "q_proj", "0.mlp.up_proj")
    quantize(llama, tmp_path / "out", *targets, "--exclude", "1.self_attn.q_proj")
    states = [key for key in tensors_of(tmp_path / "out") if "quant_state" in key]
    assert sorted(key.split(".weight")[0] for key in states) == [
        "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"
    ]  # fmt: skip
    loaded(tmp_path / "out")
    assert "matches no linear layer" in refused(llama, tmp_path / "no", "--include", "x_proj")
    quantize(llama, tmp_path / "all", "--exclude")
    assert "lm_head.weight.absmax" in tensors_of(tmp_path / "all")
    loaded(tmp_path / "all")


@pytest.mark.parametrize("index", [True, False])
def test_shards(llama, tmp_path, index):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    if not index:
        (tmp_path / "shards" / checkpoint.INDEX).unlink()
    quantize(llama, tmp_path / "one")
    quantize(tmp_path / "shards", tmp_path / "out", "--max-shard-size", "20KB")
    names = [path.name for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(names) > 2 and all(
        name.endswith(f"-of-{len(names):05}.safetensors") for name in names
    )
    assert max((tmp_path / "out" / name).stat().st_size for name in names) < 40_000
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "out")
    assert one.keys() == many.keys() and all(torch.equal(one[key], many[key]) for key in one)
    written = json.loads((tmp_path / "out" / checkpoint.INDEX).read_text())
    assert written["weight_map"].keys() == many.keys()
    assert written["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in many.values())
    loaded(tmp_path / "out")


def test_every_tensor_lies_where_its_type_can_be_read(tmp_path):
    """Odd sizes: the writer puts them last, in the order of their elements' size."""
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(3), "c": torch.randn(5).bfloat16(),
        "d": torch.randn(7, 3), "e": torch.zeros(0, 4), "f": torch.tensor(3), "g": torch.randn(4, 6).T,
    }  # fmt: skip
    with open(tmp_path / "x.safetensors", "wb") as file:
        writer = checkpoint.Writer(file, list(tensors))
        for key, tensor in tensors.items():
            writer.add(key, tensor)
        writer.finish()
    got = load_file(tmp_path / "x.safetensors")
    assert got.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(got[key], tensor) and got[key].dtype == tensor.dtype
        start = writer.header[key]["data_offsets"][0]
        assert (8 + writer.room + start) % tensor.element_size() == 0


# -- names of checkpoints and names of models --------------------------------------------------------


def save(tmp_path: pathlib.Path, cls: str, config: str, **fields: object) -> pathlib.Path:
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = getattr(transformers, cls)(getattr(transformers, config)(**sizes | fields))
    model.save_pretrained(tmp_path / cls)
    return tmp_path / cls


def check_model(folder: pathlib.Path, out: pathlib.Path, *arguments: str) -> dict[str, str]:
    """Quantizes; bitsandbytes' model must compute what the dense model does with dequantized weights.

    name of each layer left dense -> why."""
    report = out.with_suffix(".json")
    quantize(folder, out, "--report", report, *arguments)
    model = loaded(out)
    dense = type(model).from_pretrained(folder).train()
    import bitsandbytes as bnb

    count = 0
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = dense.get_submodule(name).weight
            assert layer.weight.quant_state is not None, name
            weight.data = by_bitsandbytes(layer)
            count += 1
    document = json.loads(report.read_text())
    assert count == len(document["quantized"]) > 0
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS
    with torch.no_grad():
        a, b = model(**inputs).logits, dense(**inputs).logits
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return {layer["name"]: layer["reason"] for layer in document["skipped"]}


def test_without_experts_bitsandbytes_loads_a_mixture(tmp_path):
    folder = save(tmp_path, "MixtralForCausalLM", "MixtralConfig", num_local_experts=4)
    skipped = check_model(folder, tmp_path / "out", "--exclude", "lm_head", "mlp.experts")
    experts = [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert skipped == dict.fromkeys(["lm_head", *experts], "in --exclude")


def test_tied_weights_stay_dense(tmp_path):
    folder = save(tmp_path, "LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=True)
    skipped = check_model(folder, tmp_path / "out", "--exclude")
    assert skipped == {"lm_head": "weight shared with model.embed_tokens"}


def test_a_checkpoint_without_the_models_prefix(tmp_path, copied):
    """Weights saved by the bare model, config.json of the model with a head."""
    tensors = load_file(copied / checkpoint.SINGLE)
    renamed = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    save_file(renamed, copied / checkpoint.SINGLE, {"format": "pt"})
    assert check_model(copied, tmp_path / "out") == {"lm_head": "in --exclude"}
    assert "layers.0.mlp.up_proj.weight.absmax" in tensors_of(tmp_path / "out")


def convert_llama(monkeypatch, transform: object) -> None:
    """As if checkpoints of Llamas needed it."""
    from transformers import conversion_mapping

    find = conversion_mapping.get_checkpoint_conversion_mapping
    monkeypatch.setattr(
        conversion_mapping,
        "get_checkpoint_conversion_mapping",
        lambda name: [transform] if name == "llama" else find(name),
    )


@pytest.mark.parametrize(("old", "quantized"), [("mlp.oben", True), (r"mlp.oben.weight$", False)])
def test_renamed_weights(tmp_path, copied, monkeypatch, old, quantized):
    """Renamed by a pattern that finds its statistics too, or by one that does not: then it stays dense."""
    from transformers.core_model_loading import WeightRenaming

    new = "mlp.up_proj.weight" if old.endswith("$") else "mlp.up_proj"
    convert_llama(monkeypatch, WeightRenaming(old, new))
    tensors = load_file(copied / checkpoint.SINGLE)
    for i in range(2):
        weight = tensors.pop(f"model.layers.{i}.mlp.up_proj.weight")
        tensors[f"model.layers.{i}.mlp.oben.weight"] = weight
    save_file(tensors, copied / checkpoint.SINGLE, {"format": "pt"})
    skipped = check_model(copied, tmp_path / "out")
    assert ("model.layers.1.mlp.up_proj" in skipped) is not quantized
    key = "model.layers.1.mlp.oben.weight"
    assert (f"{key}.absmax" in tensors_of(tmp_path / "out")) is quantized


def test_names_that_a_pattern_would_spoil(tmp_path, llama, monkeypatch):
    """transformers then leaves a key that the model has as it is; not so the keys of its statistics."""
    from transformers.core_model_loading import WeightRenaming

    convert_llama(monkeypatch, WeightRenaming("mlp.up_proj", "mlp.none"))
    skipped = check_model(llama, tmp_path / "out")
    assert [name for name in skipped if "up_proj" in name] == [
        f"model.layers.{i}.mlp.up_proj" for i in range(2)
    ]


def test_weights_that_are_split_when_loaded_stay_dense(tmp_path, copied, monkeypatch):
    """A checkpoint with q, k and v in one tensor, for which transformers has a converter."""
    from transformers.core_model_loading import Chunk, WeightConverter

    sources, targets = "self_attn.gate_up", ["mlp.gate_proj", "mlp.up_proj"]
    convert_llama(monkeypatch, WeightConverter(sources, targets, operations=[Chunk(dim=0)]))
    tensors = load_file(copied / checkpoint.SINGLE)
    for i in range(2):
        parts = [tensors.pop(f"model.layers.{i}.mlp.{n}_proj.weight") for n in ("gate", "up")]
        tensors[f"model.layers.{i}.self_attn.gate_up.weight"] = torch.cat(parts)
    save_file(tensors, copied / checkpoint.SINGLE, {"format": "pt"})
    skipped = check_model(copied, tmp_path / "out")
    assert skipped["model.layers.1.mlp.gate_proj"] == "converted when it is loaded"
    assert {name for name in skipped if "self_attn.gate_up" not in name} == {"lm_head"} | {
        f"model.layers.{i}.mlp.{name}_proj" for i in range(2) for name in ("gate", "up")
    }


def test_what_a_model_keeps_in_float32_stays_dense(tmp_path):
    fields = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0)
    torch.manual_seed(0)
    fields["tie_word_embeddings"] = False
    config = transformers.T5Config(vocab_size=32, decoder_start_token_id=0, **fields)
    folder = tmp_path / "t5"
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    skipped = check_model(folder, tmp_path / "out")
    assert "kept in float32 by the model" in {
        skipped[name] for name in skipped if name.endswith("wo")
    }
    quantize(folder, tmp_path / "half", "--dtype", "bfloat16")
    wo = {k: t for k, t in tensors_of(tmp_path / "half").items() if k.endswith("wo.weight")}
    assert wo and all(tensor.dtype == torch.float32 for tensor in wo.values())


def test_layers_of_another_kind_stay_dense(tmp_path):
    config = transformers.GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    line = refused(tmp_path / "gpt2", tmp_path / "out")
    assert "nothing to quantize" in line and "Conv1D" in line


def test_a_name_that_begins_another_name(llama, tmp_path):
    """ "up" stays dense, "up_proj" does not: loaders that match beginnings must tell them apart."""
    from lowrank_kernels.cli.layers import _patterns

    assert _patterns({"a.gate": "x", "a.gate_proj": None, "b": "x"}) == ["a.gate$", "b"]


# -- a real model ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2(tmp_path):
    """210 layers; bitsandbytes' model, ours and the dense one with dequantized weights give the same logits."""
    if models.smollm2_file() is None:
        pytest.skip(f"the model is not installed: {models.INSTALL_MODEL}")
    pytest.importorskip("gguf", reason="reading the model needs gguf")
    model, tokenizer, _ = models.load()
    model = model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    tokenizer.save_pretrained(tmp_path / "bf16")
    # In float32, so that ways of adding up differ by little; the values are those of bfloat16.
    options = ("--max-shard-size", "30MB", "--dtype", "float32")
    quantize(tmp_path / "bf16", tmp_path / "out", *options)
    theirs = loaded(tmp_path / "out")
    model = type(model).from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    mine = ours(type(model)(model.config), tmp_path / "out")
    assert assert_same_weights(theirs, mine) == 210
    for name, layer in mine.named_modules():
        if isinstance(layer, lk.Linear4bit):
            model.get_submodule(name).weight.data = layer.weight4bit.dequantize()
    ids = tokenizer("The keeper of the lighthouse lit the lamp.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = [m.train()(input_ids=ids).logits for m in (theirs, mine, model)]
    for of in logits[:2]:
        assert (of - logits[2]).abs().max() < 1e-4 * logits[2].abs().max()


# -- what goes along, the report, and what is refused ------------------------------------------------


def test_everything_but_weights_and_code_goes_along_or_is_named(llama, copied, tmp_path, capsys):
    (copied / "1_Pooling" / "deep").mkdir(parents=True)
    (copied / "2_Dense").mkdir()
    shutil.copy(llama / "model.safetensors", copied / "2_Dense" / "model.safetensors")
    goes = ("source.spm", "bpe.codes", "vocab.bpe", "modules.json", "1_Pooling/config.json")
    goes += ("1_Pooling/deep/x.bin.txt", "preprocessor.yaml", "merges", "2_Dense/model.safetensors")
    stays = {"old.bin": "weights", "tf_model.h5": "weights", "run.py": "code"}
    stays |= {"1_Pooling/net.onnx": "weights", "gone.txt": "a link to nothing"}
    for name in (*goes, *stays):
        if name == "gone.txt":
            (copied / name).symlink_to("nothing")
        elif not (copied / name).exists():
            (copied / name).write_text(name)
    quantize(copied, tmp_path / "out", "--report", tmp_path / "report.json")
    there = contents(tmp_path / "out")
    for name in goes:
        assert there[name] == (copied / name).read_bytes()
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())["not_copied"]
    left = {entry["name"]: entry["reason"] for entry in report}
    for name, why in stays.items():
        assert name not in there and f"{name}  {why}" in said and left[name].startswith(why)


def test_the_report_overwrites_no_model(copied, tmp_path):
    """Found out before any work; a pipe or device is written to."""
    (tmp_path / "folder").mkdir()
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"weights")
    os.link(copied / "model.safetensors", tmp_path / "hard")
    (tmp_path / "soft").symlink_to(copied / "config.json")
    before = contents(tmp_path)
    for report, words in (
        (tmp_path / "folder", "got a folder"),
        (copied / "model.safetensors", "expected a file outside of"),
        (copied / "new.json", "expected a file outside of"),
        (tmp_path / "out" / "report.json", "expected a file outside of"),
        (tmp_path / "out.partial" / "report.json", "expected a file outside of"),
        (tmp_path / "soft", "expected a file outside of"),
        (tmp_path / "hard", "is a file of"),
        (other, "exists already and is no such report"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["quantize", str(copied), str(tmp_path / "out"), "--report", str(report)])
        assert words in end.value.code and len(end.value.code.splitlines()) == 1
    assert contents(tmp_path) == before
    report = tmp_path / "report.json"
    quantize(copied, tmp_path / "out", "--report", report)
    quantize(copied, tmp_path / "out", "--report", report, "--force")  # an earlier report may go
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    descriptor = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        quantize(copied, tmp_path / "out", "--report", pipe, "--force", "--quiet")
        assert pipe.is_fifo()
        assert json.loads(os.read(descriptor, 1 << 16))["options"]["quant_type"] == "nf4"
    finally:
        os.close(descriptor)
    quantize(copied, tmp_path / "out", "--report", "/dev/null", "--force", "--quiet")
    assert os.path.exists("/dev/null") and not os.path.isfile("/dev/null")


@pytest.mark.parametrize("names", [["vision_tower"], ["lm_head", "vision"], ["layers.0"]])
def test_exclusions_that_match_nothing(llama, tmp_path, names):
    with pytest.raises(SystemExit, match=r"--exclude: .* matches no linear layer; .*q_proj"):
        cli.main(["quantize", str(llama), str(tmp_path / "out"), "--exclude", *names])


def test_layers_that_the_code_reads_stay_dense(tmp_path, capsys):
    config = transformers.MambaConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, state_size=8
    )
    model = transformers.MambaForCausalLM(config)
    model.save_pretrained(tmp_path / "mamba")
    quantize(tmp_path / "mamba", tmp_path / "out")
    assert (
        "backbone.layers.*.mixer.dt_proj (2)  its weight is read by Mamba"
        in capsys.readouterr().out
    )
    keys = tensors_of(tmp_path / "out").keys()
    packed = {key.removesuffix(".weight.absmax") for key in keys if key.endswith(".absmax")}
    assert packed == {f"backbone.layers.{i}.mixer.in_proj" for i in (0, 1)}
    config = lk.pretrained_config(tmp_path / "out")
    loaded = transformers.MambaForCausalLM.from_pretrained(tmp_path / "out", config=config)
    assert loaded(torch.arange(12)[None]).logits.isfinite().all()
