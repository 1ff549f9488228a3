"""Heads that were trained whole beside an adapter: files of PEFT and of TRL's RewardTrainer, both ways."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lowrank_kernels as lk

peft = pytest.importorskip("peft")

SIZES = dict(
    vocab_size=48, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
IDS = torch.tensor([[5, 9, 11, 3], [7, 4, 6, 8]])


def classifier(r=4):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_labels=1)
    model = transformers.LlamaForSequenceClassification(config).eval()
    lk.replace_linear(model, r=r, adapter_name="rm", exclude_modules=["score"], progress=False)
    return model


def causal():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    lk.replace_linear(model, r=4, adapter_name="other", progress=False)
    return model


def shuffled(model, name):
    """Every matrix of the adapter, and the head, random."""
    with torch.no_grad():
        for parameter in lk.adapters(model)[name].parameters:
            parameter.normal_(std=0.1)
        model.score.weight.normal_()
    return model


@pytest.fixture
def folder(tmp_path):
    """What PEFT saves of a classifier with one label, and its scores."""
    model = peft.get_peft_model(
        classifier(r=0),
        peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="SEQ_CLS"),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "rm")
    with torch.no_grad():
        return tmp_path / "rm", model(IDS).logits


def test_what_peft_saves_of_a_reward_model_scores_the_same(folder):
    path, expected = folder
    assert json.loads((path / "adapter_config.json").read_text())["modules_to_save"]
    model = classifier()
    lk.load_adapter(model, path, "rm")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected)


def test_what_is_saved_here_scores_the_same_in_peft(tmp_path):
    model = classifier()
    shuffled(model, "rm")
    with torch.no_grad():
        expected = model(IDS).logits
    lk.save_adapter(model, tmp_path / "rm", "rm")
    config = json.loads((tmp_path / "rm" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["score"]
    loaded = peft.PeftModel.from_pretrained(classifier(r=0), tmp_path / "rm").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, expected)


def test_saving_names_no_head_that_is_in_the_file(tmp_path, recwarn):
    model = classifier()
    model.score.requires_grad_(True)
    model.model.norm.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    for layer in model.model.layers:
        layer.input_layernorm.requires_grad_(False)
        layer.post_attention_layernorm.requires_grad_(False)
    lk.save_adapter(model, tmp_path / "rm", "rm")
    assert not [w for w in recwarn if "score" in str(w.message)]


def test_a_language_model_takes_the_adapter_and_says_that_there_was_a_head(folder):
    path, _ = folder
    model = causal()
    with pytest.warns(
        UserWarning, match=r"holds a head that this model has no module for: score\.weight"
    ):
        lk.load_adapter(model, path, "rm")
    expected = load_file(path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    layer = model.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.lora_A["rm"].weight, expected[key])


@pytest.mark.parametrize("as_state_dict", [False, True], ids=["folder", "state dict"])
def test_a_bank_keeps_the_head(folder, as_state_dict):
    path, expected = folder
    tensors = load_file(path / "adapter_model.safetensors")
    model = causal()
    model.load_state_dict(classifier().state_dict(), strict=False)
    bank = lk.AdapterBank.for_model(model, num_pages=4)
    bank.load("rm", tensors, lora_alpha=8) if as_state_dict else bank.load("rm", path)
    head = bank.heads["rm"]
    assert list(head) == ["score.weight"]
    assert torch.equal(head["score.weight"], tensors["base_model.model.score.weight"])
    with torch.no_grad(), bank.using(bank.plan(["rm", "rm"], [4, 4])):
        hidden = model.model(IDS).last_hidden_state[:, -1]
    torch.testing.assert_close(hidden @ head["score.weight"].T, expected)
    bank.evict("rm")
    assert bank.heads == {}


def rewritten(path, **changes):
    """The file with other tensors; None takes one away."""
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    for key, tensor in changes.items():
        tensors.pop(f"base_model.model.{key}", None)
        if tensor is not None:
            tensors[f"base_model.model.{key}"] = tensor
    save_file(tensors, file)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score.weight": torch.randn(2, 64)}, r"score\.weight: expected shape \(1, 64\) as the model has it"),
        ({"score.weight": torch.full((1, 64), torch.nan)}, r"score\.weight: expected finite numbers"),
        ({"score.weight": torch.ones(1, 64, dtype=torch.int32)}, r"score\.weight: expected float32, bfloat16"),
        ({"score.weight": torch.ones(1, 8, 8)}, r"score\.weight: expected a matrix or a bias"),
        ({"score.bias": torch.ones(1)}, r"score: expected the parameters of the model's head"),
        ({"lm_head.weight": torch.ones(48, 64)}, r"lm_head\.weight: expected a key .* saved whole"),
        ({"score.modules_to_save.weight": torch.ones(1, 64)}, r"modules_to_save\.weight: expected a key"),
    ],
)  # fmt: skip
def test_a_wrong_head_is_refused_and_nothing_changes(folder, changes, message):
    path, _ = folder
    model = classifier()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        lk.load_adapter(model, rewritten(path, **changes), "rm")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_other_modules_that_were_trained_whole_are_refused(folder):
    path, _ = folder
    file = path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"modules_to_save": ["score", "lm_head"]}))
    with pytest.raises(
        ValueError, match="modules_to_save: expected null or a list of 'classifier', 'score'"
    ):
        lk.load_adapter(classifier(), path, "rm")


def test_a_head_in_4_bits_is_refused(folder):
    path, _ = folder
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**SIZES, num_labels=1)
    )
    lk.replace_linear(model, r=4, exclude_modules=[], progress=False)
    with pytest.raises(ValueError, match="score: expected the model's head to be dense"):
        lk.load_adapter(model, path, "rm")
