"""``RankingTrainer``: TRL's ``RewardTrainer`` on rankings of several answers instead of pairs."""

from __future__ import annotations

from typing import Any

import torch
import trl

from .losses import ranking_loss


class RankingTrainer(trl.RewardTrainer):
    """Trains a reward model on K answers to each prompt that people ranked, by :func:`ranking_loss`.

    All answers to a prompt are scored in one batch and are one element of the loss, so that a prompt with many pairs
    does not count for more. Everything else is the trainer's of TRL: models, PEFT, files, arguments. The loss of pairs
    is what it is there, and so are the logs but for the margin.

    Args: those of ``trl.RewardTrainer``. The datasets have the columns ``completions``, a list of at least two texts or
    of messages each, and ``ranks``, a number for each, the smallest for the best; and ``prompt``, before all
    completions, a text or messages. ``per_device_train_batch_size`` counts prompts. ``max_length`` leaves out prompts
    with a longer answer.

    Raises ValueError naming the row for other columns, lengths that differ, or no two ranks that differ.

    Source: Ouyang et al., arXiv 2203.02155, section 3.5.

    Examples:
        >>> from lowrank_kernels import rlhf
        >>> rlhf.RankingTrainer.__mro__[1].__name__
        'RewardTrainer'
    """

    def __init__(self, *args, data_collator=None, **kwargs) -> None:
        super().__init__(*args, data_collator=data_collator or _collate, **kwargs)
        if data_collator is None:
            pad = self.model.config.get_text_config().pad_token_id
            self.data_collator = lambda rows: _collate(rows, pad)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name: str):
        """Token ids of every answer behind its prompt, with an end token if they are texts."""
        rows = dataset.map(
            lambda row, number: _encoded(row, number, processing_class),
            with_indices=True,
            remove_columns=dataset.column_names,
        )
        if args.max_length is not None:
            rows = rows.filter(lambda row: max(map(len, row["answers"])) <= args.max_length)
        return rows

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["answers", "ranks"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean over prompts of :func:`ranking_loss`."""
        counts, ranks = inputs["counts"].tolist(), inputs["ranks"]
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        )
        scores = outputs.logits.squeeze(-1)
        pairs = list(zip(scores.split(counts), ranks.split(counts), strict=True))
        loss = torch.stack([ranking_loss(s[None], r[None]) for s, r in pairs]).mean()
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * scores.square().mean()
        with torch.no_grad():
            everywhere = self.accelerator.gather_for_metrics(scores.float())
            metrics = self._metrics["train" if self.model.training else "eval"]
            metrics["min_reward"].append(everywhere.min().item())
            metrics["mean_reward"].append(everywhere.mean().item())
            metrics["max_reward"].append(everywhere.max().item())
            right = torch.stack([_accuracy(s, r) for s, r in pairs]).mean()
            metrics["accuracy"].append(self.accelerator.gather_for_metrics(right).mean().item())
        return (loss, outputs) if return_outputs else loss


def _accuracy(scores: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """The share of pairs in the order of their ranks."""
    better = ranks[:, None] < ranks[None, :]
    return (scores[:, None] > scores[None, :])[better].float().mean()


def _encoded(row: dict[str, Any], number: int, tokenizer) -> dict[str, list]:
    completions, ranks = row.get("completions"), row.get("ranks")
    if not isinstance(completions, list) or not isinstance(ranks, list):
        raise ValueError(
            f"row {number}: expected the columns 'completions' and 'ranks', a list each, got {sorted(row)}"
        )
    if len(completions) != len(ranks) or len(set(ranks)) < 2:
        raise ValueError(
            f"row {number}: expected a rank for each of the completions and two that differ, got "
            f"{len(completions)} completions and ranks {ranks}"
        )
    prompt = row.get("prompt") or ("" if isinstance(completions[0], str) else [])
    answers = []
    for completion in completions:
        if type(completion) is not type(prompt):
            raise ValueError(
                f"row {number}: expected prompt and completions to be texts, or all to be messages, got "
                f"{type(prompt).__name__} and {type(completion).__name__}"
            )
        if isinstance(completion, str):
            end = "" if completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
            answers.append(tokenizer(prompt + completion + end)["input_ids"])
        else:
            turns = tokenizer.apply_chat_template(
                prompt + completion, tokenize=True, return_dict=True
            )
            answers.append(turns["input_ids"])
    return {"answers": answers, "ranks": [float(rank) for rank in ranks]}


def _collate(rows: list[dict], pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """All answers of all prompts, padded on the right; ``counts``: how many each prompt has."""
    answers = [torch.tensor(ids) for row in rows for ids in row["answers"]]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(answers, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad([torch.ones_like(ids) for ids in answers], batch_first=True),
        "ranks": torch.tensor([rank for row in rows for rank in row["ranks"]]),
        "counts": torch.tensor([len(row["answers"]) for row in rows]),
    }
