"""save_pretrained of models with 4-bit layers, whoever made them; and the one rule of what stays dense."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import lowrank_kernels as lk

transformers = pytest.importorskip("transformers", reason="an optional dependency")
pytest.importorskip("accelerate", reason="transformers needs it for device maps")

import tiny_models  # noqa: E402
from tiny_models import auto, files, layers, load, logits  # noqa: E402

dense = tiny_models.dense


def plain(dense, name: str):
    return auto(name).from_pretrained(dense(name), dtype=torch.float32).eval()


# -- after replace_linear ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "tied", "neox", "mixtral", "hrm", "bert", "t5"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:most of this model")
def test_round_trip(dense, name, storage, tmp_path):
    model = plain(dense, name)
    lk.replace_linear(
        model, r=0, quant_type="fp4", blocksize=128, quant_storage=storage, progress=False
    )
    model.save_pretrained(tmp_path / "a")
    again = auto(name).from_pretrained(tmp_path / "a")
    assert layers(again).keys() == layers(model).keys() != set()
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "b")
    assert files(tmp_path / "a").keys() == files(tmp_path / "b").keys()
    assert torch.equal(logits(auto(name).from_pretrained(tmp_path / "b")), logits(model))


def test_a_part_that_was_replaced_and_layers_made_by_hand(dense, tmp_path):
    """What counts is what is there when the model is saved."""
    model = plain(dense, "llama")
    lk.replace_linear(model.model.layers[0], r=0, progress=False)
    mlp = model.model.layers[1].mlp
    mlp.up_proj = lk.Linear4bit.from_linear(mlp.up_proj)
    model.save_pretrained(tmp_path)
    again = auto("llama").from_pretrained(tmp_path)
    assert layers(again).keys() == layers(model).keys() and len(layers(model)) == 8
    assert torch.equal(logits(again), logits(model))


def test_a_dense_model_is_saved_as_ever(dense, tmp_path):
    model = plain(dense, "llama")
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


# -- adapters ----------------------------------------------------------------------------------------


def two_adapters(model):
    lk.replace_linear(
        model, ["q_proj", "up_proj"], r=4, lora_alpha=7, lora_dropout=0.1, progress=False,
        init_lora_weights=False,
    )  # fmt: skip
    lk.add_adapter(
        model, "zwei", r=2, lora_alpha=3, use_rslora=True, adapter_dtype=torch.bfloat16,
        init_lora_weights=False, target_modules=["q_proj"],
    )  # fmt: skip
    return model.eval()


@pytest.mark.parametrize("source", ["replace_linear", "LowRankConfig", "bitsandbytes"])
def test_adapters_go_along(dense, source, tmp_path):
    if source == "replace_linear":
        model = plain(dense, "llama")
    else:
        save_as = "lowrank_kernels" if source == "LowRankConfig" else "bitsandbytes"
        model = load(dense("llama"), config=lk.LowRankConfig(save_as=save_as), dtype=torch.float32)
    two_adapters(model)
    for active in ("zwei", "default"):
        lk.set_adapter(model, active)
        model.save_pretrained(tmp_path / active)
        again = auto("llama").from_pretrained(tmp_path / active).eval()
        assert torch.equal(logits(again), logits(model))
        old, new = layers(model, lk.LoRALinear4bit), layers(again, lk.LoRALinear4bit)
        assert old.keys() == new.keys()
        for name, layer in old.items():
            for field in ("r", "lora_alpha", "lora_dropout", "use_rslora", "scaling"):
                assert getattr(new[name], field) == getattr(layer, field), (name, field)
            for part in ("lora_A", "lora_B"):
                mine, theirs = getattr(layer, part), getattr(new[name], part)
                for key in mine:
                    assert mine[key].weight.dtype == theirs[key].weight.dtype
                    assert torch.equal(mine[key].weight, theirs[key].weight)
                    assert theirs[key].weight.requires_grad == (key == active)
    saved = json.loads((tmp_path / "default" / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "lowrank_kernels"
    lk.delete_adapter(model, "zwei")
    lk.delete_adapter(model, "default")
    model.save_pretrained(tmp_path / "none")
    saved = json.loads((tmp_path / "none" / "config.json").read_text())["quantization_config"]
    assert "adapters" not in saved
    assert (saved["quant_method"] == "bitsandbytes") == (source == "bitsandbytes")


def test_a_merged_adapter_is_refused(dense, tmp_path):
    model = two_adapters(plain(dense, "llama"))
    lk.merge_adapter(model)
    with pytest.raises(RuntimeError, match=r"save_pretrained: model.*is merged; call unmerge"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.update(r=0), "r: expected an integer >= 1, got 0"),
        (lambda a: a.update(r=[4]), "r: expected an integer"),
        (lambda a: a.update(name="a.b"), "name: expected a non-empty string"),
        (lambda a: a.update(dtype="int8"), "dtype: expected one of"),
        (lambda a: a.update(layers="q"), "layers: expected a list of strings"),
        (lambda a: a["layers"].append("model.nowhere"), "model.nowhere: expected a linear layer"),
        (lambda a: a["layers"].append("model.norm"), "model.norm: expected a linear layer"),
        (lambda a: a["layers"].append("lm_head"), "in quantization_config|in 4 bits"),
        (lambda a: a.pop("r"), "expected objects with name, r,"),
    ],
)
def test_adapters_that_lie(dense, change, words, tmp_path):
    model = plain(dense, "llama")
    lk.replace_linear(model, ["q_proj"], r=4, progress=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"]["adapters"][0])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        auto("llama").from_pretrained(tmp_path)


# -- counting, resizing, accelerate ------------------------------------------------------------------


def test_numbers_of_parameters(dense):
    model = plain(dense, "llama")
    whole, inner = model.num_parameters(), model.model.num_parameters()
    without = model.num_parameters(exclude_embeddings=True)
    lk.replace_linear(model, r=0, progress=False)
    loaded = load(dense("llama"))
    for quantized in (model, loaded, copy.deepcopy(model)):
        assert quantized.num_parameters() == whole
        assert quantized.model.num_parameters() == inner
        assert quantized.num_parameters(exclude_embeddings=True) == without
        for parameter in quantized.parameters():
            parameter.requires_grad = True
        assert quantized.num_parameters(only_trainable=True) < whole / 2


def test_resized_output_embeddings(dense):
    model = plain(dense, "llama")
    lk.replace_linear(model, r=0, exclude_modules=None, progress=False)
    head = model.lm_head.dequantize()
    with pytest.warns(UserWarning, match="the output embeddings are a Linear4bit of 99 rows"):
        model.resize_token_embeddings(104)
    assert type(model.lm_head) is torch.nn.Linear and logits(model).shape[-1] == 104
    assert torch.equal(model.lm_head.weight[:99], head)
    lk.replace_linear(model, ["lm_head"], exclude_modules=None, r=4, progress=False)
    with pytest.raises(ValueError, match="the output embeddings are a LoRALinear4bit"):
        model.resize_token_embeddings(96)


@pytest.mark.parametrize("double_quant", [True, False])
def test_accelerate_loads_a_checkpoint(dense, double_quant, tmp_path):
    import accelerate
    from safetensors.torch import save_file

    model = plain(dense, "llama")
    want = copy.deepcopy(model)
    lk.replace_linear(want, r=0, double_quant=double_quant, progress=False)
    state = {key: value.clone() for key, value in want.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    lk.replace_linear(model, r=0, double_quant=double_quant, progress=False)
    for layer in layers(model).values():
        layer.reset_parameters()
    accelerate.load_checkpoint_in_model(model, str(tmp_path), {"": "cpu"})
    assert torch.equal(logits(model), logits(want))

    del state["model.layers.0.mlp.up_proj.weight.absmax"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj.weight.*absmax"):
        accelerate.load_checkpoint_in_model(model, str(tmp_path), {"": "cpu"})
    other = plain(dense, "llama")
    lk.replace_linear(other, r=0, quant_type="fp4", progress=False)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.weight.*quant_type fp4"):
        accelerate.load_checkpoint_in_model(other, str(tmp_path), {"": "cpu"})


# -- one rule ----------------------------------------------------------------------------------------

TEXT = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SSM = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
T5 = {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4}
# Class -> (config, what stays dense because of the code).
FAMILIES = {
    "T5ForConditionalGeneration": (transformers.T5Config(**T5), {"wo"}),
    "UMT5ForConditionalGeneration": (transformers.UMT5Config(**T5), {"wo"}),
    "MT5ForConditionalGeneration": (transformers.MT5Config(**T5), {"wo"}),
    "LongT5ForConditionalGeneration": (transformers.LongT5Config(**T5), {"wo"}),
    "SwitchTransformersForConditionalGeneration": (
        transformers.SwitchTransformersConfig(**T5, num_experts=2), {"wo"}),
    "MambaForCausalLM": (transformers.MambaConfig(**SSM), {"dt_proj", "x_proj", "out_proj"}),
    "FalconMambaForCausalLM": (
        transformers.FalconMambaConfig(**SSM), {"dt_proj", "x_proj", "out_proj"}),
    "Mamba2ForCausalLM": (transformers.Mamba2Config(**SSM, num_heads=8, head_dim=16, n_groups=1),
                          {"out_proj"}),
    "JambaForCausalLM": (transformers.JambaConfig(
        **TEXT, intermediate_size=64, num_key_value_heads=2, num_experts=2, attn_layer_period=2,
        attn_layer_offset=1), {"dt_proj"}),
    "RwkvForCausalLM": (transformers.RwkvConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, attention_hidden_size=64,
        intermediate_size=64, rescale_every=1), {"output", "value"}),
    "MobileBertForMaskedLM": (transformers.MobileBertConfig(
        **TEXT, embedding_size=64, intermediate_size=64, true_hidden_size=64,
        intra_bottleneck_size=64), {"dense"}),
    "DebertaForMaskedLM": (transformers.DebertaConfig(**TEXT, intermediate_size=64), {"in_proj"}),
    "BloomForCausalLM": (transformers.BloomConfig(
        vocab_size=99, hidden_size=64, n_layer=2, n_head=4), set()),
    "OPTForCausalLM": (transformers.OPTConfig(
        **TEXT, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=64), set()),
    "WavLMModel": (transformers.WavLMConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        conv_dim=(32, 32), conv_stride=(2, 2), conv_kernel=(3, 3), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4), {"q_proj", "k_proj", "v_proj", "out_proj"}),
}  # fmt: skip


HEADS = {"lm_head", "head"}  # LowRankConfig leaves them out


def inputs(model) -> dict[str, torch.Tensor]:
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(1, 800, generator=torch.Generator().manual_seed(0))}
    decoder = {"decoder_input_ids": tiny_models.TOKENS} if model.config.is_encoder_decoder else {}
    return {"input_ids": tiny_models.TOKENS, **decoder}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_families(name, tmp_path):
    """Models whose code reads weights run as their dense twins do, and all three ways agree on the layers."""
    config, dense_names = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    model.save_pretrained(tmp_path / "dense")
    twin = copy.deepcopy(model)
    heads = [head for head in sorted(HEADS) if hasattr(model, head)]
    report = lk.replace_linear(model, r=0, exclude_modules=heads, progress=False)
    words = ("its weight is read by", "kept in float32 by the model")
    found = {x.name.rpartition(".")[2] for x in report.skipped if x.reason.startswith(words)}
    assert found - {"lm_head"} == dense_names
    for key, layer in layers(model).items():
        twin.get_submodule(key).weight.copy_(layer.dequantize())
    for key, experts in model.named_modules():
        if isinstance(experts, lk.Experts4bit):
            twin.set_submodule(key, experts.dequantized())
    torch.testing.assert_close(
        model(**inputs(model))[0], twin(**inputs(model))[0], rtol=1e-4, atol=1e-4
    )

    loaded = type(model).from_pretrained(tmp_path / "dense", quantization_config=lk.LowRankConfig())
    assert layers(loaded).keys() - HEADS == layers(model).keys() - HEADS
    torch.testing.assert_close(
        loaded.eval()(**inputs(model))[0], twin(**inputs(model))[0], rtol=1e-4, atol=1e-4
    )
    why = {layer.name: layer.reason for layer in loaded.hf_quantizer.skipped}
    assert {x.name for x in report.skipped if x.reason.startswith(words)} - {
        "lm_head"
    } <= why.keys()


@pytest.mark.filterwarnings("ignore")
def test_experts_are_told(dense, caplog):
    with caplog.at_level("WARNING"):
        model = load(dense("mixtral"), "mixtral")
    assert "4 stacks of experts are in 4 bits as well (model.layers.0" in caplog.text
    assert not any("experts" in layer.name for layer in model.hf_quantizer.skipped)
    config = lk.LowRankConfig(skip_modules=["lm_head", "mlp.experts"])
    with pytest.warns(UserWarning, match=r"most of this model stays dense: 4 stacks of experts"):
        model = load(dense("mixtral"), "mixtral", config)
    skipped = [x for x in model.hf_quantizer.skipped if x.reason == "in skip_modules"]
    assert sum(".experts." in layer.name for layer in skipped) == 4


@pytest.mark.parametrize("skip", [["lm_head", "vision_tower"], ["layers.7"], ["(lm_head)x"]])
def test_skip_modules_that_match_nothing(dense, skip):
    with pytest.raises(ValueError, match=r"skip_modules: .* matches no module of LlamaForCausalLM"):
        load(dense("llama"), config=lk.LowRankConfig(skip_modules=skip))


def test_a_bomb_in_skip_modules(dense, tmp_path):
    model = load(dense("llama"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["skip_modules"] = [r"(\w|.)+!", "((a"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="skip_modules: expected regular expressions"):
        auto("llama").from_pretrained(tmp_path)
    config["quantization_config"]["skip_modules"] = [r"(\w|.)+!"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(auto("llama").from_pretrained(tmp_path)), logits(model))
