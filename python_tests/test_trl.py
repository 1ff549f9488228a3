"""TRL's trainers on SmolLM2 with this library's layers: what they learn, and that nothing but adapters changes."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
import pathlib
import re
import shutil

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
import markdown_blocks
import tiny_llama
from lowrank_kernels.cli import corpus, models

for package in ("trl", "peft", "datasets", "accelerate", "gguf"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"TRL's trainers need {package}", allow_module_level=True)
if models.smollm2_file() is None:
    pytest.skip(f"the model is not installed: {models.INSTALL_MODEL}", allow_module_level=True)
if lk.backends.active() == "reference":
    pytest.skip("the reference is too slow for a real model", allow_module_level=True)

LAYERS = 4  # of the 30 that SmolLM2 has, for all but one test
STEPS = 4
BATCH = 2


@pytest.fixture(scope="module")
def smollm2():
    """(the whole model in float32, tokenizer); tests copy it."""
    return models.load()[:2]


@pytest.fixture(scope="module")
def folder(smollm2, tmp_path_factory):
    """The first layers of SmolLM2 as a Hugging Face model."""
    model, tokenizer = smollm2
    folder = tmp_path_factory.mktemp("smollm2")
    short = copy.deepcopy(model)
    short.model.layers = short.model.layers[:LAYERS]
    short.config.num_hidden_layers = LAYERS
    short.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)  # pytest would keep it


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return smollm2[1]


def causal(folder: pathlib.Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of ``Linear4bit``, to which PEFT adds adapters."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    lk.replace_linear(model, r=0, progress=False)
    return model


def scoring(folder: pathlib.Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same under a new head of one score."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype)
    lk.replace_linear(model, exclude_modules=["score"], r=0, progress=False)
    return model


# -- data: one batch, which each step sees again ------------------------------------------------------


def turns(role: str, texts: list[str]) -> list[list[dict]]:
    return [[{"role": role, "content": text}] for text in texts]


def dataset(**columns: str):
    """``prompt`` and other columns of conversations: the keeper's answers, or a clerk's to the same questions."""
    from datasets import Dataset

    rows = corpus.load()[0][:BATCH]
    said = {"keeper": rows, "clerk": corpus.clerk(rows)}
    data = {"prompt": turns("user", [row["prompt"] for row in rows])}
    for column, speaker in columns.items():
        data[column] = turns("assistant", [row["response"] for row in said[speaker]])
    return Dataset.from_dict(data)


def answers():
    return dataset(completion="keeper")


def preferences():
    return dataset(chosen="keeper", rejected="clerk")


# -- a run -----------------------------------------------------------------------------------------


def trainer(kind: str, model, data, tokenizer, out: pathlib.Path, lora=None, rest=None, **config):
    """``kind`` + "Trainer" of TRL over a LoraConfig of ``lora``; ``rest`` are further arguments of the trainer."""
    import trl
    from peft import LoraConfig

    config = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "bf16": False,
        **config,
    }
    args = getattr(trl, f"{kind}Config")(
        output_dir=str(out),
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **{"save_strategy": "no", **config},
    )
    task = "SEQ_CLS" if kind == "Reward" else "CAUSAL_LM"
    adapters = LoraConfig(r=8, target_modules="all-linear", task_type=task, **(lora or {}))
    rest = {"peft_config": adapters, **(rest or {})}
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        **rest,
    )


def logged(run, key: str = "loss") -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers, packed bytes among them, by the names they have without PEFT."""
    found = [*model.named_parameters(), *model.named_buffers()]
    plain = r"^base_model\.model\.|\.base_layer|\.original_module"
    return {re.sub(plain, "", name): tensor.detach().clone() for name, tensor in found}


def train(run, before: dict[str, torch.Tensor] | None = None) -> list[float]:
    """Runs it; asserts that all adapters and nothing else moved, ``before`` being the model's own tensors."""
    start = tensors(run.model)
    trainable = {name for name, p in run.model.named_parameters() if p.requires_grad}
    trainable = {name.removeprefix("base_model.model.") for name in trainable}
    assert trainable and all("lora_" in n or "modules_to_save" in n for n in trainable)
    run.train()
    end = tensors(run.model)
    assert start.keys() == end.keys()
    assert {name for name in start if not torch.equal(start[name], end[name])} == trainable
    if before is not None:
        assert before.keys() == end.keys() - trainable
        assert all(
            torch.equal(before[n], end[n]) and before[n].dtype == end[n].dtype for n in before
        )
        assert sum(n.endswith("q_proj.nested_absmax") for n in before) == len(layers(run.model))
    losses = logged(run)
    assert len(losses) == run.args.max_steps and all(map(math.isfinite, losses))
    return losses


def layers(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule("base_model.model.model.layers"))


def falls(losses: list[float]) -> bool:
    return all(later < earlier for earlier, later in itertools.pairwise(losses))


def oracle(model: nn.Module) -> nn.Module:
    """The model with dense layers of the dequantized weights."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, lk.Linear4bit):
            dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            dense.weight.data, dense.bias = layer.dequantize(torch.float32), layer.bias
            model.set_submodule(path, dense)
    return model


def distinct_letters(completions, **_) -> list[float]:
    return [float(len(set(said[0]["content"]))) for said in completions]


GRPO = {
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "max_completion_length": 8,
    "beta": 0.1,
}


@pytest.fixture
def fused_calls(monkeypatch) -> list:
    """One entry for each forward of base and adapter in one operator."""
    from lowrank_kernels.interop import peft_layer

    calls, real = [], peft_layer.lora_linear_4bit
    monkeypatch.setattr(
        peft_layer, "lora_linear_4bit", lambda *args: (calls.append(args[0].shape), real(*args))[1]
    )
    return calls


# -- the trainers ------------------------------------------------------------------------------------


def test_sft_on_the_whole_model(smollm2, tmp_path, fused_calls):
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    report = lk.replace_linear(model, r=0, progress=False)
    before = tensors(model)
    losses = train(trainer("SFT", model, answers(), tokenizer, tmp_path), before)
    assert falls(losses) and losses[-1] < 0.9 * losses[0], losses
    assert len(report.replaced) == 210 and len(fused_calls) == 210 * STEPS


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("SFT", {}),
        ("SFT", {"bf16": True}),
        ("DPO", {"f_divergence_type": "js_divergence"}),
        ("Reward", {}),
        ("Reward", {"bf16": True}),
    ],
)
def test_training_is_that_of_the_dequantized_model(kind, config, folder, tokenizer, tmp_path):
    """Loss by loss, and again the same bits."""
    make = scoring if kind == "Reward" else causal
    data = answers() if kind == "SFT" else preferences()
    model = make(folder)
    before = tensors(model)
    run = trainer(kind, model, data, tokenizer, tmp_path, **config)
    losses = train(run, before)
    assert falls(losses), losses
    if kind == "DPO":
        assert losses[0] == pytest.approx(math.log(2), rel=1e-6), (
            "the policy began as the reference"
        )
        assert logged(run, "rewards/margins")[-1] > 0
    again = train(trainer(kind, make(folder), data, tokenizer, tmp_path, **config))
    assert again == losses
    dense = oracle(make(folder))
    expected = train(trainer(kind, dense, data, tokenizer, tmp_path, **config))
    assert losses == pytest.approx(expected, rel=5e-2 if config.get("bf16") else 1e-3)


def test_dpo_from_an_adapter_makes_a_reference_of_it(folder, tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(causal(folder), lora)
    first = tensors(model)
    run = trainer("DPO", model, preferences(), tokenizer, tmp_path, rest={"peft_config": None})
    losses = train(run)
    assert losses[0] == pytest.approx(math.log(2), rel=1e-6) and falls(losses)
    last = tensors(run.model)
    references = [name for name in last if ".ref." in name]
    assert len(references) == 2 * 7 * LAYERS
    assert all(torch.equal(last[n], first[n.replace(".ref.", ".default.")]) for n in references)


def test_grpo(folder, tokenizer, tmp_path):
    def run():
        rest = {"reward_funcs": distinct_letters}
        return trainer("GRPO", causal(folder), dataset(), tokenizer, tmp_path, rest=rest, **GRPO)

    first = run()
    losses = train(first, tensors(causal(folder)))
    kl, rewards = logged(first, "kl"), logged(first, "reward")
    assert kl[0] == 0.0 and kl[-1] > 0.0, "it began as the base and left it"
    assert len(rewards) == STEPS and all(reward > 0 for reward in rewards)
    second = run()
    assert train(second) == losses and logged(second, "reward") == rewards


@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO", "Reward"])
def test_from_a_path(kind, folder, tokenizer, tmp_path, fused_calls):
    """With a quantization_config: the bytes of ``replace_linear``, and adapters in bfloat16, as TRL wants them."""
    rest = {"quantization_config": lk.LowRankConfig()}
    data, config = {"SFT": answers, "GRPO": dataset}.get(kind, preferences)(), {"bf16": True}
    if kind == "GRPO":
        rest["reward_funcs"] = distinct_letters
        config |= GRPO
    run = trainer(kind, str(folder), data, tokenizer, tmp_path, rest=rest, **config)
    trainable = [p for p in run.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.bfloat16}
    losses = train(run, tensors((scoring if kind == "Reward" else causal)(folder)))
    if kind == "GRPO":
        assert fused_calls
    else:
        assert falls(losses) and len(fused_calls) == 7 * LAYERS * STEPS


# -- around a run ------------------------------------------------------------------------------------


def test_reward_in_float32_of_a_model_that_says_4bit(folder, tokenizer, tmp_path):
    """TRL makes its head bfloat16, which float32 activations do not fit; the page says what to do."""
    model = scoring(folder)
    before = tensors(model)
    model.is_loaded_in_4bit = True
    run = trainer("Reward", model, preferences(), tokenizer, tmp_path)
    head = run.model.get_submodule("base_model.model.score.modules_to_save.default")
    assert head.weight.dtype == torch.bfloat16, "no longer: then the page need not say it"
    run.model.float()
    losses = train(run, before)
    assert head.weight.dtype == torch.float32 and falls(losses)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant, folder, tokenizer, tmp_path):
    """Dropout is drawn again as it was."""
    lora = {"lora_dropout": 0.1}
    plain = trainer("SFT", causal(folder), answers(), tokenizer, tmp_path, lora)
    expected = train(plain)
    config = {"gradient_checkpointing": True}
    config["gradient_checkpointing_kwargs"] = {"use_reentrant": use_reentrant}
    run = trainer("SFT", causal(folder), answers(), tokenizer, tmp_path, lora, **config)
    assert train(run) == expected
    assert any(getattr(module, "gradient_checkpointing", False) for module in run.model.modules())


def test_resuming_changes_nothing(folder, tokenizer, tmp_path):
    config = {"save_strategy": "steps", "save_steps": STEPS // 2}
    lora = {"lora_dropout": 0.1}
    whole = trainer("SFT", causal(folder), answers(), tokenizer, tmp_path, lora, **config)
    expected = train(whole)
    rest = trainer("SFT", causal(folder), answers(), tokenizer, tmp_path, lora)
    rest.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert logged(rest) == expected, "those before are in the checkpoint"
    first, second = tensors(whole.model), tensors(rest.model)
    assert all(torch.equal(first[name], second[name]) for name in first)


# -- docs/trl.md -------------------------------------------------------------------------------------


def test_the_page(tmp_path, monkeypatch):
    page = markdown_blocks.read("docs/trl.md")
    monkeypatch.chdir(tmp_path)
    names = markdown_blocks.run(
        "docs/trl.md", {"path": tiny_llama.save(tmp_path / "llama", [page])}
    )
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert len(logged(names["trainer"])) == STEPS and names["kl"].isfinite()
