"""transformers' Trainer over ``LoRALinear4bit`` without PEFT: trains, saves, resumes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
import tiny_llama

transformers = pytest.importorskip("transformers", reason="its Trainer is tested")
pytest.importorskip("accelerate", reason="the Trainer needs it")

STEPS = 6
TEXTS = [
    "the sun slips under the ledge at ten past seven",
    "warm the pot and count to ninety please",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama.save(tmp_path_factory.mktemp("llama"), TEXTS)


def load(folder, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    lk.replace_linear(model, r=4, lora_dropout=0.1, progress=False)
    return model


def trainer(model: nn.Module, folder, out, **config):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    data = [{"input_ids": ids, "labels": ids} for ids in tokenizer(TEXTS)["input_ids"]]
    assert len(data[0]["input_ids"]) != len(data[1]["input_ids"]), "padding is part of it"
    args = transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **{"save_strategy": "no", **config},
    )
    collator = transformers.DataCollatorForSeq2Seq(tokenizer)
    return transformers.Trainer(model, args, collator, data, processing_class=tokenizer)


def losses(run) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers, packed bytes among them."""
    found = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in found}


@pytest.mark.parametrize("config", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_the_adapters_only(dtype, config, folder, tmp_path):
    model = load(folder, dtype)
    before = tensors(model)
    run = trainer(model, folder, tmp_path, **config)
    run.train()
    after = tensors(run.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".lora_" in name} and len(moved) == 2 * 14
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert all(late < early for early, late in itertools.pairwise(losses(run)[::2])), losses(run)


def test_saves_and_resumes(folder, tmp_path):
    """The checkpoint of a run that goes on, and the model that another program loads from it."""
    whole = trainer(load(folder), folder, tmp_path, save_strategy="steps", save_steps=STEPS // 2)
    whole.train()
    rest = trainer(load(folder), folder, tmp_path)
    rest.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert losses(rest) == losses(whole) and len(losses(whole)) == STEPS
    expected, got = tensors(whole.model), tensors(rest.model)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)

    from safetensors.torch import load_file

    fresh = transformers.AutoModelForCausalLM.from_pretrained(folder)
    lk.replace_linear(fresh, r=4, quant_type="fp4", blocksize=128, progress=False)
    state = load_file(tmp_path / f"checkpoint-{STEPS}" / "model.safetensors")
    missing, unexpected = fresh.load_state_dict(state, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(fresh.eval()(ids).logits, whole.model.eval()(ids).logits)


def test_a_model_that_from_pretrained_quantized(folder, tmp_path):
    """Trainer refuses quantized models without PEFT; not one with adapters of its own."""
    expected = trainer(load(folder), folder, tmp_path / "expected")
    expected.train()
    out = tmp_path / "run"
    config = {"save_strategy": "steps", "save_steps": STEPS // 2}

    def quantized():
        return load(folder, quantization_config=lk.LowRankConfig())

    whole = trainer(quantized(), folder, out, **config)
    assert whole.model.is_quantized
    whole.train()
    rest = trainer(quantized(), folder, out)
    rest.train(resume_from_checkpoint=str(out / f"checkpoint-{STEPS // 2}"))
    assert losses(whole) == losses(rest) == losses(expected)
    got, before = tensors(rest.model), tensors(quantized())
    assert {n for n in got if not torch.equal(got[n], before[n])} == {
        n for n in got if ".lora_" in n
    }


def test_an_adapter_alone_is_saved_by_its_own_function(folder, tmp_path):
    run = trainer(load(folder), folder, tmp_path / "run")
    run.train()
    lk.save_adapter(run.model, tmp_path / "adapter")
    fresh = load(folder)
    lk.load_adapter(fresh, tmp_path / "adapter")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(fresh.eval()(ids).logits, run.model.eval()(ids).logits)
