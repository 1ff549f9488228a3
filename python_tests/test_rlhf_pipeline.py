"""From TRL's reward model to a policy trained against it, prompts in all of TRL's formats, samplers that misbehave."""

import math

import pytest
import torch
import transformers

import lowrank_kernels as lk
from lowrank_kernels import rlhf
from lowrank_kernels.rlhf.rollout import ended, padded_left

WORDS = [
    "good",
    "bad",
    "fine",
    "poor",
    "film",
    "plot",
    "actor",
    "a",
    "the",
    "is",
    "was",
    "very",
    "not",
    "user",
    "assistant",
]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] }}"
    "{% if not (loop.last and continue_final_message) %} <end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
SIZES = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<end>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<end>", pad_token="<pad>",
        chat_template=TEMPLATE,
    )  # fmt: skip


def settings(tokenizer):
    return transformers.LlamaConfig(
        vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=2, **SIZES
    )


def causal(tokenizer):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(settings(tokenizer)).eval()
    lk.replace_linear(model, r=0, progress=False)
    return model


def scoring(tokenizer):
    """A reward model on the same base."""
    torch.manual_seed(1)
    config = settings(tokenizer)
    config.num_labels = 1
    model = transformers.LlamaForSequenceClassification(config)
    model.model = causal(tokenizer).model
    return model


def ppo(tokenizer, folder, roles=None, prompts=(), reward_funcs=None, sampler=None, **changes):
    arguments = dict(
        max_steps=2, max_completion_length=6, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    config = rlhf.PPOConfig(str(folder), **(arguments | changes))
    made = rlhf.PPOTrainer(
        roles or rlhf.RoleModel(causal(tokenizer), r=4), config, train_dataset=prompts,
        processing_class=tokenizer, reward_funcs=reward_funcs, sampler=sampler,
    )  # fmt: skip
    made.remove_callback(transformers.PrinterCallback)
    return made


TEXTS = [{"prompt": text} for text in ("the film", "a very", "plot", "the actor was not")]


def ones(completions, **_):
    return [1.0] * len(completions)


# -- TRL -------------------------------------------------------------------------------------------


def test_a_reward_model_of_trl_scores_the_same_and_trains_a_policy(tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    peft, datasets = pytest.importorskip("peft"), pytest.importorskip("datasets")
    pairs = datasets.Dataset.from_dict(
        {
            "prompt": ["the film is", "a plot was"] * 2,
            "chosen": [" good", " fine"] * 2,
            "rejected": [" bad", " poor"] * 2,
        }
    )
    config = trl.RewardConfig(
        str(tmp_path), max_steps=3, learning_rate=1e-2, per_device_train_batch_size=4, report_to="none",
        use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    reward = trl.RewardTrainer(
        scoring(tokenizer),
        config,
        train_dataset=pairs,
        processing_class=tokenizer,
        peft_config=lora,
    )
    reward.train()
    reward.save_model(tmp_path / "rm")
    roles = rlhf.RoleModel(causal(tokenizer), reward=tmp_path / "rm")
    encoded = tokenizer(
        ["the film is good <end>", "bad", "a plot"], return_tensors="pt", padding=True
    )
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    with torch.no_grad():
        expected = reward.model.eval()(input_ids=ids, attention_mask=mask).logits[:, 0]
    assert expected.std() > 1e-3
    out = roles.score(ids, mask, ["reward"])["reward"]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    made = ppo(tokenizer, tmp_path / "ppo", roles, TEXTS, missing_eos_penalty=1.0)
    made.train()
    assert torch.equal(roles.score(ids, mask, ["reward"])["reward"], out)
    made.save_model(tmp_path / "out")
    on = rlhf.RoleModel(
        causal(tokenizer), reward=tmp_path / "rm", policy=tmp_path / "out" / "policy", value=tmp_path / "out" / "value"
    )  # fmt: skip
    both = ["policy", "value"]
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            roles.score(ids, mask, both).values(), on.score(ids, mask, both).values(), strict=True
        )
    )


# -- prompts ---------------------------------------------------------------------------------------


def test_messages_become_prompts_by_the_chat_template(tokenizer, tmp_path):
    seen = []

    def reward(prompts, completions, colour, **_):
        seen.append((prompts, completions, colour))
        return [1.0] * len(prompts)

    rows = [
        {"prompt": [{"role": "user", "content": "the film"}], "colour": "red"},
        {
            "prompt": [
                {"role": "user", "content": "the film"},
                {"role": "assistant", "content": "is very"},
            ],
            "colour": "blue",
        },
    ]
    made = ppo(tokenizer, tmp_path, prompts=rows, reward_funcs=reward, max_steps=1)
    text = [tokenizer.decode(row["prompt_ids"]) for row in made.prompts]
    assert text == ["user the film <end> assistant", "user the film <end> assistant is very"]
    made.train()
    prompts, completions, colours = seen[0]
    assert all(prompt in (rows[0]["prompt"], rows[1]["prompt"]) for prompt in prompts)
    assert all(len(c) == 1 and c[0]["role"] == "assistant" for c in completions)
    assert sorted(set(colours)) == ["blue", "red"]


def test_a_dataset_of_the_datasets_library(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(TEXTS)
    made = ppo(tokenizer, tmp_path, prompts=rows, reward_funcs=ones, max_prompt_length=2)
    made.train()
    assert max(len(row["prompt_ids"]) for row in made.prompts) == 2
    assert made.state.global_step == 2


def test_prompts_of_one_token_and_completions_of_one(tokenizer, tmp_path):
    made = ppo(
        tokenizer, tmp_path, prompts=["film"], reward_funcs=ones, max_completion_length=1
    )  # fmt: skip
    made.train()
    assert all(math.isfinite(log["loss"]) for log in made.state.log_history if "loss" in log)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([{"text": "the film"}], ValueError, "row 0: expected a column 'prompt'"),
        ([{"prompt": ""}], ValueError, "row 0: expected a prompt of a token"),
        ([{"prompt": []}], ValueError, "row 0: expected a column 'prompt'"),
        ([{"prompt": [{"content": "the film"}]}], ValueError, "row 0: expected a column 'prompt'"),
        ([{"prompt_ids": [3, 500]}], ValueError, "row 0: expected token ids from 0 to"),
        ([{"prompt_ids": [3, -1]}], ValueError, "row 0: expected token ids from 0 to"),
        ([{"prompt_ids": [3, 0.5]}], ValueError, "row 0: expected token ids from 0 to"),
        ([{"prompt_ids": "film"}], ValueError, "row 0: expected token ids from 0 to"),
        ([3], TypeError, "row 0: expected a text or a row of columns, got int"),
        ("film", TypeError, "train_dataset: expected a dataset or a list of prompts, got str"),
    ],
)  # fmt: skip
def test_prompts_that_are_refused(tokenizer, tmp_path, rows, error, message):
    with pytest.raises(error, match=message):
        ppo(tokenizer, tmp_path, prompts=rows, reward_funcs=ones)


# -- reward functions ------------------------------------------------------------------------------


async def later(completions, **_):
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (later, "reward_funcs: later: expected a list of numbers, got coroutine"),
        (lambda **_: 1.0, "expected a list of numbers, got float"),
        (lambda **_: ["good"] * 4, "expected finite numbers or None"),
        (lambda **_: [math.inf] * 4, "expected finite numbers or None"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:coroutine")
def test_functions_that_return_no_numbers(tokenizer, tmp_path, function, message):
    made = ppo(tokenizer, tmp_path, prompts=TEXTS, reward_funcs=function)
    with pytest.raises((TypeError, ValueError), match=message):
        made.train()


def test_a_function_may_return_a_tensor(tokenizer, tmp_path):
    made = ppo(
        tokenizer, tmp_path, prompts=TEXTS, reward_funcs=lambda **_: torch.tensor([1.0, 2.0, 3.0, 4.0])
    )  # fmt: skip
    made.train()
    assert made.state.log_history[0]["score"] == 2.5


# -- samplers --------------------------------------------------------------------------------------


class Bad:
    """Changes what a sampler returns."""

    def __init__(self, change):
        self.change = change

    def generate(self, prompts, n, sampling):
        ids, mask = padded_left(prompts, sampling.pad_token_id)
        tokens = torch.full((len(ids), 3), 5)
        return self.change(ended(torch.cat([ids, tokens], 1), mask, sampling))

    def sync(self, policy, version):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r._replace(mask=r.mask[:, :-1]), r"sampler: expected mask \[4, 7\]"),
        (lambda r: r._replace(ids=r.ids[:2], mask=r.mask[:2]), "sampler: expected 4 completions, got 2"),
        (lambda r: r._replace(prompt_length=7), "sampler: expected prompts and completions"),
        (lambda r: r._replace(prompt_length=0), "sampler: expected prompts and completions"),
        (lambda r: r._replace(mask=r.mask.index_fill(1, torch.tensor([4, 5, 6]), 0)),
         "sampler: expected a token in every completion"),
        (lambda r: r._replace(ids=r.ids.float()), "sampler: expected integers"),
        (lambda r: r._replace(logprobs=torch.zeros(4, 7)), r"sampler: expected logprobs \[4, 6\]"),
    ],
)  # fmt: skip
def test_rollouts_that_are_refused(tokenizer, tmp_path, change, message):
    made = ppo(tokenizer, tmp_path, prompts=TEXTS, reward_funcs=ones, sampler=Bad(change))
    with pytest.raises(ValueError, match=message):
        made.train()


def test_a_sampler_of_other_numbers_is_logged(tokenizer, tmp_path):
    sampler = Bad(lambda r: r._replace(logprobs=torch.full(r.mask[:, 1:].shape, -1.0)))
    made = ppo(tokenizer, tmp_path, prompts=TEXTS, reward_funcs=ones, sampler=sampler)
    made.train()
    logs = [log for log in made.state.log_history if "sampler_difference" in log]
    assert logs and logs[0]["sampler_difference"] > 0.1


def test_a_completion_goes_up_to_its_end_token_and_with_it():
    sampling = rlhf.Sampling(3, 1.0, eos_token_id=2, pad_token_id=0)
    tokens = torch.tensor([[0, 7, 5, 2, 9], [6, 7, 2, 2, 2], [6, 7, 5, 5, 5]])
    rollout = ended(tokens, torch.tensor([[0, 1], [1, 1], [1, 1]]), sampling)
    assert rollout.ids.tolist() == [[0, 7, 5, 2, 0], [6, 7, 2, 0, 0], [6, 7, 5, 5, 5]]
    assert rollout.mask.tolist() == [[0, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    expected = [[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1]]
    assert rollout.of_completion.long().tolist() == expected


def test_completions_are_drawn_by_their_probabilities(tokenizer):
    """Of one step, by 4096 seeds: counts within five standard deviations of their expectations, at temperature 2."""
    roles = rlhf.RoleModel(causal(tokenizer), r=4)
    with torch.no_grad():
        roles.model.lm_head.weight.mul_(40)
        prompt = torch.tensor([[7, 8]])
        p = (roles.model(prompt).logits[0, -1].double() / 2).softmax(-1)
    count = 4096
    sampling = rlhf.Sampling(1, 2.0, 2, 0, seeds=tuple(range(count)))
    rollout = rlhf.TransformersSampler(roles).generate([[7, 8]], count, sampling)
    seen = rollout.ids[:, 2].bincount(minlength=len(p)).double()
    assert p.max() > 3 / len(p)
    assert ((seen - count * p).abs() <= 5 * (count * p * (1 - p)).sqrt() + 1).all()


def test_a_completion_is_its_seed_s_whatever_else_is_sampled(tokenizer):
    sampler = rlhf.TransformersSampler(rlhf.RoleModel(causal(tokenizer), r=4))

    def completions(prompts, seeds):
        sampling = rlhf.Sampling(8, 1.0, 2, 0, seeds=seeds)
        rollout = sampler.generate(prompts, 1, sampling)
        return [ids[keep].tolist() for ids, keep in zip(rollout.ids[:, 1:], rollout.of_completion)]

    prompts = [[7], [8, 9, 10], [7]]
    together = completions(prompts, (1, 2, 3))
    torch.manual_seed(5)
    assert together == [completions([p], (s,))[0] for p, s in zip(prompts, (1, 2, 3))]
    assert together[0] != together[2]


@pytest.mark.parametrize(
    "changes",
    [dict(eval_strategy="steps"), dict(auto_find_batch_size=True), dict(adaptive_kl=True, kl_horizon=3)],
)  # fmt: skip
def test_settings_that_ppo_has_no_use_for_are_refused(tokenizer, tmp_path, changes):
    name = {"adaptive_kl": "kl_horizon"}.get(next(iter(changes)), next(iter(changes)))
    with pytest.raises(ValueError, match=f"{name}: expected"):
        ppo(tokenizer, tmp_path, prompts=TEXTS, reward_funcs=ones, **changes)


def test_autocast_to_bfloat16_keeps_the_first_ratio(tokenizer, tmp_path):
    class Recorded(rlhf.PPOTrainer):
        ratios = []

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, out = super().compute_loss(model, inputs, True, num_items_in_batch)
            self.ratios.append((out["policy"] - inputs["logprobs"])[inputs["where"]].detach())
            return loss

    config = rlhf.PPOConfig(
        str(tmp_path), max_steps=2, max_completion_length=6, per_device_train_batch_size=2, bf16=True,
        gradient_accumulation_steps=2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    roles = rlhf.RoleModel(causal(tokenizer), r=4)
    made = Recorded(
        roles, config, train_dataset=TEXTS, processing_class=tokenizer, reward_funcs=ones
    )
    made.train()
    assert len(made.ratios) == 4 and not torch.cat(made.ratios).any()
