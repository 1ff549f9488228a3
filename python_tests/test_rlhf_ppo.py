"""PPOTrainer: learns, keeps what is frozen, resumes bit for bit, is one computation on any number of processes."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lowrank_kernels as lk
from lowrank_kernels import rlhf
from rlhf_models import VOCABULARY, batch, causal, reward_folder, sft_folder

PROMPTS = [{"prompt_ids": [3 + i, 4 + i, 5 + i][: 1 + i % 3]} for i in range(16)]


def evens(completion_ids, **_):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def config(folder, **changes):
    arguments = dict(
        max_steps=4, max_completion_length=6, per_device_train_batch_size=4, num_mini_batches=2,
        learning_rate=1e-2, eos_token_id=2, pad_token_id=0, use_cpu=True, report_to="none", save_strategy="no",
        seed=1, kl_coef=0.02,
    )  # fmt: skip
    return rlhf.PPOConfig(str(folder), **(arguments | changes))


def trainer(
    folder, roles=None, prompts=PROMPTS, reward_funcs=evens, cls=rlhf.PPOTrainer, **changes
):
    roles = roles or rlhf.RoleModel(causal(), r=8)
    data = dict(train_dataset=prompts, reward_funcs=reward_funcs)
    made = cls(roles, config(folder, **changes), **data)
    made.remove_callback(transformers.PrinterCallback)
    made.remove_callback(transformers.ProgressCallback)
    return made


def trained(made):
    return {n: p.detach().clone() for n, p in made.roles.named_parameters() if p.requires_grad}


class Recorded(rlhf.PPOTrainer):
    """Keeps the ratios of each micro-batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, out = super().compute_loss(model, inputs, True, num_items_in_batch)
        ratio = (out["policy"] - inputs["logprobs"]).exp()[inputs["where"]]
        self.__dict__.setdefault("ratios", []).append(ratio.detach())
        return (loss, out) if return_outputs else loss


def test_the_score_rises_and_only_policy_and_value_change(tmp_path):
    roles = rlhf.RoleModel(causal(initializer_range=0.2), r=8)  # its logits can move
    changes = dict(max_steps=40, kl_coef=0.0, learning_rate=2e-2, per_device_train_batch_size=16)
    made = trainer(tmp_path, roles, **changes)
    before = {n: t.clone() for n, t in made.roles.state_dict().items()}
    made.train()
    scores = [log["score"] for log in made.state.log_history if "score" in log]
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.2
    after = made.roles.state_dict()
    changed = [n for n in before if not torch.equal(before[n], after[n])]
    assert changed and all(
        ".policy." in n or ".value." in n or n == "value_head.weight" for n in changed
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_ratio_of_every_rollout_is_1_in_every_bit(tmp_path, dtype):
    roles = rlhf.RoleModel(causal(dtype=dtype), r=8)
    made = trainer(
        tmp_path,
        roles,
        cls=Recorded,
        max_steps=6,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )
    made.train()
    # Two mini-batches of two micro-batches: those of the first step are before an update.
    exactly = [bool((ratio == 1).all()) for ratio in made.ratios]
    assert exactly == [True, True, False, False] * 3


@pytest.mark.parametrize("steps", [4, 5], ids=["between rollouts", "within a rollout"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, steps):
    changes = dict(max_steps=8, save_strategy="steps", save_steps=steps, adaptive_kl=True, normalize_scores=True,
                   num_ppo_epochs=2, gradient_accumulation_steps=2, per_device_train_batch_size=2)  # fmt: skip
    whole = trainer(tmp_path / "a", **changes)
    whole.train()
    again = trainer(tmp_path / "a", **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{steps}"))
    expected = trained(whole)
    assert all(torch.equal(expected[n], p) for n, p in trained(again).items())
    last = [log for log in whole.state.log_history if "score" in log][-1]
    assert [log for log in again.state.log_history if "score" in log][-1] == last
    assert again.control_of_kl.value == whole.control_of_kl.value
    names = {path.name for path in (tmp_path / "a" / f"checkpoint-{steps}").iterdir()}
    assert {
        "policy",
        "value",
        "optimizer.pt",
        "ppo_state_0.json",
    } <= names and "model.safetensors" not in names


def test_a_second_epoch_has_another_order_and_resumes_too(tmp_path):
    changes = dict(max_steps=8, save_strategy="steps", save_steps=6)
    seen = []

    class Orders(rlhf.PPOTrainer):
        def _make_rollout(self, rows):
            seen.append([tuple(row["prompt_ids"]) for row in rows])
            return super()._make_rollout(rows)

    whole = trainer(
        tmp_path / "a", cls=Orders, **changes
    )  # 16 prompts: two rollouts of 8 in an epoch
    whole.train()
    assert len(seen) == 4 and sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3])
    assert seen[:2] != seen[2:]
    again = trainer(tmp_path / "a", **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    expected = trained(whole)
    assert all(torch.equal(expected[n], p) for n, p in trained(again).items())


def test_the_reward_adapter_scores_where_there_are_no_functions(tmp_path):
    reward_folder(tmp_path / "rm")
    sft_folder(tmp_path / "sft")
    roles = rlhf.RoleModel(causal(), reference=tmp_path / "sft", reward=tmp_path / "rm")
    made = trainer(
        tmp_path / "out", roles, reward_funcs=None, divergence="js", missing_eos_penalty=1.0
    )
    made.train()
    rollout = made._rollout
    scores = roles.score(rollout["ids"], rollout["mask"], ["reward"])["reward"]
    assert torch.isfinite(scores).all()
    made.save_model(tmp_path / "saved")
    peft = pytest.importorskip("peft")
    policy = peft.PeftModel.from_pretrained(causal(), tmp_path / "saved" / "policy").eval()
    ids, mask = batch(ragged=False)
    with torch.no_grad():
        logits = policy(ids).logits[:, :-1].log_softmax(-1)
    expected = logits.gather(2, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(
        roles.score(ids, mask, ["policy"])["policy"], expected, rtol=1e-4, atol=1e-4
    )


def test_advantages_are_those_of_scores_and_penalties_at_the_last_token(tmp_path):
    made = trainer(tmp_path, whiten_advantages=False, kl_coef=0.5, lam=1.0, max_steps=1)
    with torch.no_grad():
        for role in ("policy", "value"):
            for parameter in lk.adapters(made.roles.model)[role].parameters:
                parameter.normal_(std=0.1)
        made.roles.value_head.weight.normal_()
    rows = [made.prompts[i] for i in range(8)]
    made.accelerator.free_memory()
    rollout = made._make_rollout(rows)
    where = rollout["where"]
    out = made.roles.score(rollout["ids"], rollout["mask"], ["policy", "reference", "value"])
    for row in range(8):
        kept = where[row].nonzero()[:, 0]
        ids = rollout["ids"][row, 1:][kept].tolist()
        d = (out["policy"] - out["reference"])[row, kept]
        rewards = -0.5 * d
        rewards[-1] += evens([ids])[0]
        returns = rewards.flip(0).cumsum(0).flip(0)  # lambda 1, gamma 1
        torch.testing.assert_close(rollout["returns"][row, kept], returns, rtol=1e-5, atol=1e-5)
        values = out["value"][row, kept]
        torch.testing.assert_close(
            rollout["advantages"][row, kept], returns - values, rtol=1e-5, atol=1e-5
        )


def test_the_losses_are_those_of_the_rollout(tmp_path):
    """Before an update: no ratio, no value is anywhere but where the rollout found it."""
    made = trainer(tmp_path, max_steps=1, num_mini_batches=1, cliprange_value=1e-6, kl_coef=0.5)
    with torch.no_grad():
        made.roles.value_head.weight.normal_()
    made.train()
    log, rollout = made.state.log_history[0], made._rollout
    where = rollout["where"]
    error = rollout["values"][where] - rollout["returns"][where]
    assert error.std() > 0.1 and log["clip_fraction_value"] == 0
    assert log["value_loss"] == pytest.approx(0.5 * error.square().mean().item(), rel=1e-5)
    assert log["policy_loss"] == pytest.approx(
        -rollout["advantages"][where].mean().item(), abs=1e-6
    )
    assert log["ratio"] == 1 and log["approx_kl"] == 0
    assert log["loss"] == pytest.approx(log["policy_loss"] + 0.1 * log["value_loss"], rel=1e-5)


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    changes = dict(max_steps=4, optim="sgd", learning_rate=0.5, num_mini_batches=2)
    runs = []
    for size, steps in ((8, 1), (2, 4)):
        sizes = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        made = trainer(tmp_path, **sizes, **changes)  # sets the seed
        before = trained(made)
        made.train()
        runs.append(trained(made))
    for name, tensor in runs[0].items():
        torch.testing.assert_close(runs[1][name], tensor, rtol=1e-3, atol=1e-6, msg=name)
    assert any((runs[0][name] - before[name]).abs().max() > 1e-3 for name in before)


def test_texts_are_learnt_beside(tmp_path):
    class Words:
        """A tokenizer of numbers."""

        eos_token_id, pad_token_id = 2, 0

        def __call__(self, text):
            return {"input_ids": [int(word) for word in text.split()]}

        def batch_decode(self, ids, skip_special_tokens):
            return [" ".join(map(str, row)) for row in ids]

        def save_pretrained(self, folder):
            pass

    prompts = [
        {"prompt": " ".join(map(str, row["prompt_ids"])), "answer": i}
        for i, row in enumerate(PROMPTS)
    ]
    seen = {}

    def reward(prompts, completions, completion_ids, answer, **rest):
        seen.update(prompts=prompts, completions=completions, answer=answer, rest=rest)
        return [None if i % 2 else 1.0 for i in range(len(prompts))]

    def other(completions, **_):
        return [0.5] * len(completions)

    made = rlhf.PPOTrainer(
        rlhf.RoleModel(causal(), r=8), config(tmp_path, ptx_coef=5.0, max_steps=40, reward_weights=[1.0, 2.0]),
        train_dataset=prompts, processing_class=Words(), reward_funcs=[reward, other],
        ptx_dataset=["7 8 9 10 11 12", {"text": "7 8 9 10"}],
    )  # fmt: skip
    made.train()
    logs = [log for log in made.state.log_history if "ptx_nll" in log]
    assert logs[-1]["ptx_nll"] < logs[0]["ptx_nll"] - 1
    assert (
        logs[0]["score"] == 1.5
        and logs[0]["rewards/reward"] == 1.0
        and logs[0]["rewards/other"] == 0.5
    )
    assert all(isinstance(text, str) for text in seen["prompts"] + seen["completions"])
    assert len(seen["answer"]) == 8 and not seen["rest"]


def test_several_completions_of_a_prompt_and_checkpointing(tmp_path):
    made = trainer(
        tmp_path,
        num_generations=4,
        activation_checkpointing=True,
        entropy_coef=0.01,
        whiten_rewards=True,
    )
    made.train()
    length = 1 + int(made._rollout["where"].any(0).nonzero()[0])
    prompts = made._rollout["ids"][:, :length].tolist()
    assert all(prompts[4 * i] == prompts[4 * i + j] for i in range(2) for j in range(4))


def test_fewer_prompts_than_a_rollout_takes_come_again(tmp_path):
    made = trainer(tmp_path, prompts=["unused"] and PROMPTS[:3])
    made.train()
    assert made.state.global_step == 4


WORKER = pathlib.Path(__file__).parent / "workers_rlhf_ppo.py"


def test_two_processes_train_as_one_does(tmp_path):
    """Gradients, statistics and logs are those of all processes, and a run that was resumed is the same."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    command = [sys.executable, str(WORKER), str(tmp_path / "one"), "1"]
    subprocess.run(command, check=True, timeout=300, env=environment)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
               str(WORKER), str(tmp_path / "two"), "2"]  # fmt: skip
    subprocess.run(command, check=True, timeout=300, env=environment)
    one, *two = (torch.load(tmp_path / name) for name in ("one-0.pt", "two-0.pt", "two-1.pt"))
    for name, tensor in one["parameters"].items():
        assert torch.equal(two[0]["parameters"][name], two[1]["parameters"][name])
        torch.testing.assert_close(two[0]["parameters"][name], tensor, rtol=2e-3, atol=2e-5)
    assert two[0]["kl_coef"] == pytest.approx(one["kl_coef"]) == two[1]["kl_coef"]
    assert two[0]["statistics"] == pytest.approx(one["statistics"])
    assert two[0]["log"] == two[1]["log"]
    for name in ("score", "kl", "kl_exact", "entropy", "loss", "value_loss", "completion_length"):
        assert two[0]["log"][name] == pytest.approx(one["log"][name], rel=1e-2, abs=1e-4), name


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(top_p=0.9), "top_p: expected 1"),
        (dict(top_k=50), "top_k: expected 0"),
        (dict(temperature=0.0), "temperature: expected a number > 0"),
        (dict(divergence="renyi"), "divergence: expected one of kl"),
        (dict(kl_coef=-1.0), "kl_coef: expected a number >= 0"),
        (dict(lam=1.5), "lam: expected a number from 0 to 1"),
        (dict(num_mini_batches=0), "num_mini_batches: expected an integer >= 1"),
        (dict(num_generations=3), "num_generations: expected a divisor"),
        (dict(cliprange=float("nan")), "cliprange: expected a number > 0"),
    ],
)  # fmt: skip
def test_arguments_that_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "arguments", "error", "message"),
    [
        (dict(pad_token_id=2), {}, ValueError, "expected a padding token that is not the end token"),
        (dict(eos_token_id=None), {}, ValueError, "expected a tokenizer with an end token"),
        ({}, dict(reward_funcs=None), ValueError, "reward_funcs: expected functions"),
        ({}, dict(reward_funcs=torch.nn.Linear(1, 1)), TypeError, "reward_funcs: expected functions"),
        ({}, dict(prompts=[]), ValueError, "train_dataset: expected a prompt"),
        ({}, dict(prompts=None), TypeError, "train_dataset: expected a dataset"),
        ({}, dict(prompts=["text"]), ValueError, "processing_class: expected a tokenizer"),
        ({}, dict(prompts=[{"prompt_ids": []}]), ValueError, "row 0: expected a prompt of a token"),
        (dict(ptx_coef=1.0), {}, ValueError, "ptx_dataset: expected it"),
        (dict(reward_weights=[1.0, 2.0]), {}, ValueError, "reward_weights: expected one for each"),
    ],
)  # fmt: skip
def test_trainers_that_are_refused(tmp_path, changes, arguments, error, message):
    with pytest.raises(error, match=message):
        trainer(tmp_path, **arguments, **changes)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda ids: [1.0], "expected 8 numbers"),
        (lambda ids: [float("nan")] * len(ids), "expected finite numbers"),
        (lambda ids: [None] * len(ids), "expected a number from one of them"),
    ],
)
def test_what_reward_functions_may_not_return(tmp_path, scores, message):
    made = trainer(tmp_path, reward_funcs=lambda completion_ids, **_: scores(completion_ids))
    with pytest.raises(ValueError, match=message):
        made.train()


def test_a_checkpoint_of_other_processes_is_refused(tmp_path):
    made = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    made.train()
    folder = tmp_path / "checkpoint-2"
    assert json.loads((folder / "ppo_state_0.json").read_text())["micro"] == 2
    for changes in (dict(num_mini_batches=1), dict(num_ppo_epochs=2)):
        again = trainer(tmp_path, max_steps=4, **changes)
        with pytest.raises(ValueError, match="expected the processes and batches of"):
            again.train(resume_from_checkpoint=str(folder))
    (folder / "ppo_state_0.json").unlink()
    again = trainer(tmp_path, max_steps=4)
    with pytest.raises(FileNotFoundError, match=r"expected ppo_state_0\.json of process 0"):
        again.train(resume_from_checkpoint=str(folder))


def test_a_checkpoint_with_another_rollout_is_refused(tmp_path):
    trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    file = tmp_path / "checkpoint-1" / "ppo_rollout_0.safetensors"
    good = load_file(file)
    for changes, message in (
        ({"values": good["values"][:3]}, "expected 8 rows of"),
        ({"values": good["values"][:, 1:]}, "expected 8 rows of .* of one length"),
        ({"other": good["values"]}, "expected 8 rows of"),
        ({"order": torch.zeros(8, dtype=torch.long)}, "expected an order of 8 rows"),
    ):
        save_file(good | {n: t.clone() for n, t in changes.items()}, file)
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path).train(resume_from_checkpoint=str(file.parent))
    file.unlink()
    with pytest.raises(FileNotFoundError):
        trainer(tmp_path).train(resume_from_checkpoint=str(file.parent))


def test_ids_are_below_the_vocabulary():
    assert max(max(row["prompt_ids"]) for row in PROMPTS) < VOCABULARY
