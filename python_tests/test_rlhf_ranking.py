"""RankingTrainer: K answers to a prompt are learnt, and two are what TRL's RewardTrainer makes of them."""

import pytest
import torch
import transformers

from lowrank_kernels import rlhf
from rlhf_models import SIZES, batch, causal, classifier

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def tokenizer():
    """Words that are numbers; a chat template of their contents."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {str(i): i for i in range(3, 48)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(["<pad>", "<s>", "</s>"])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", bos_token="<s>"
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    return made


def rankings(rows=16, answers=4):
    """The best answer has the largest numbers."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(rows):
        numbers = torch.randint(3, 48, (answers, 3), generator=generator)
        ranks = torch.empty(answers, dtype=torch.long)
        ranks[numbers.sum(1).argsort(descending=True)] = torch.arange(answers)
        completions = [" " + " ".join(map(str, row.tolist())) for row in numbers]
        made.append({"prompt": "5 6", "completions": completions, "ranks": ranks.tolist()})
    return made


def config(folder, **changes):
    arguments = dict(
        output_dir=str(folder), max_steps=60, per_device_train_batch_size=4, learning_rate=2e-2, report_to="none",
        use_cpu=True, bf16=False, save_strategy="no", logging_steps=1, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    return trl.RewardConfig(**(arguments | changes))


def trainer(cls, folder, rows, tokenizer, **changes):
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="SEQ_CLS")
    made = cls(
        classifier(), config(folder, **changes), train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer, peft_config=lora,
    )  # fmt: skip
    made.remove_callback(transformers.PrinterCallback)
    return made


def test_rankings_are_learnt_and_the_file_is_a_role(tmp_path, tokenizer):
    made = trainer(rlhf.RankingTrainer, tmp_path, rankings(), tokenizer)
    made.train()
    accuracy = [log["accuracy"] for log in made.state.log_history if "accuracy" in log]
    assert sum(accuracy[-8:]) / 8 > 0.9 > sum(accuracy[:4]) / 4
    made.save_model(str(tmp_path / "rm"))
    ids, mask = batch()
    with torch.no_grad():
        expected = made.model.eval()(input_ids=ids, attention_mask=mask).logits[:, 0]
    roles = rlhf.RoleModel(causal(), reward=tmp_path / "rm")
    scores = roles.score(ids, mask, ["reward"])["reward"]
    torch.testing.assert_close(scores, expected.float(), rtol=1e-4, atol=1e-4)


def test_pairs_are_trained_as_trl_trains_them(tmp_path, tokenizer):
    rows = rankings(answers=2)
    best = [row["ranks"].index(0) for row in rows]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completions"][i], "rejected": row["completions"][1 - i]}
        for row, i in zip(rows, best)
    ]  # fmt: skip
    changes = dict(max_steps=4, learning_rate=1e-3)
    ours = trainer(rlhf.RankingTrainer, tmp_path, rows, tokenizer, **changes)
    ours.train()
    theirs = trainer(trl.RewardTrainer, tmp_path, pairs, tokenizer, **changes)
    theirs.train()
    losses = [
        [log["loss"] for log in made.state.log_history if "loss" in log] for made in (ours, theirs)
    ]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=1e-4)


def test_prompts_may_have_different_numbers_of_answers_and_be_messages(tmp_path, tokenizer):
    def turn(role, text):
        return [{"role": role, "content": text}]

    rows = [
        {
            "prompt": turn("user", "5 6"),
            "completions": [turn("assistant", text) for text in row["completions"][:count]],
            "ranks": [1, 1, 2, 3][:count],
        }
        for row, count in zip(rankings(), [3, 4] * 8)
    ]
    made = trainer(rlhf.RankingTrainer, tmp_path, rows, tokenizer, max_steps=2)
    made.train()
    assert made.state.global_step == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "5", "rejected": "6"}, "row 0: expected the columns 'completions' and 'ranks'"),
        ({"completions": ["5", "6"], "ranks": [1]}, "row 0: expected a rank for each"),
        ({"completions": ["5", "6"], "ranks": [1, 1]}, "row 0: expected a rank for each .* two that differ"),
        ({"prompt": "5", "completions": [[{"role": "assistant", "content": "5"}]] * 2, "ranks": [1, 2]},
         "row 0: expected prompt and completions to be texts"),
    ],
)  # fmt: skip
def test_rows_that_are_refused(tmp_path, tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        trainer(rlhf.RankingTrainer, tmp_path, [row], tokenizer)


def test_the_model_s_vocabulary_is_the_tokenizer_s(tokenizer):
    assert len(tokenizer) == SIZES["vocab_size"]
