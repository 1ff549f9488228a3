"""The data of PPO: prompts as token ids, their order, texts for PPO-ptx, and reward functions of completions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch


def read_prompts(dataset, tokenizer, max_length: int | None, vocabulary: int) -> list[dict]:
    """A row with ``prompt_ids`` for each row of ``dataset``, which keeps its other columns.

    ``prompt`` is a text or a list of messages, to which the tokenizer's chat template adds the assistant's turn, or
    leaves it open if the last message is one; ``prompt_ids`` are taken as they are. Raises ValueError, TypeError for
    anything else.
    """
    if dataset is None or isinstance(dataset, str | dict) or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"train_dataset: expected a dataset or a list of prompts, got {type(dataset).__name__}"
        )
    if not len(dataset):
        raise ValueError("train_dataset: expected a prompt at least, got none")
    rows = []
    for number, row in enumerate(dataset):
        if not isinstance(row, str | dict):
            raise TypeError(
                f"train_dataset: row {number}: expected a text or a row of columns, got {type(row).__name__}"
            )
        row = {"prompt": row} if isinstance(row, str) else dict(row)
        if "prompt_ids" not in row:
            row["prompt_ids"] = _ids_of(row.get("prompt"), tokenizer, number)
        ids = _integers(row["prompt_ids"], vocabulary, number)
        if not ids:
            raise ValueError(
                f"train_dataset: row {number}: expected a prompt of a token at least, got none"
            )
        rows.append(row | {"prompt_ids": ids if max_length is None else ids[-max_length:]})
    return rows


def _integers(ids: Sequence[int], vocabulary: int, number: int) -> list[int]:
    tokens = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
    if not all(type(token) is int and 0 <= token < vocabulary for token in tokens):
        raise ValueError(
            f"train_dataset: row {number}: expected token ids from 0 to {vocabulary - 1}, got {ids!r:.80}"
        )
    return tokens


def _ids_of(prompt: object, tokenizer, number: int) -> list[int]:
    if tokenizer is None:
        raise ValueError(
            "processing_class: expected a tokenizer for prompts that are texts, got None"
        )
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if _is_conversation(prompt):
        goes_on = prompt[-1]["role"] == "assistant"
        encoded = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=not goes_on, continue_final_message=goes_on, tokenize=True,
            return_dict=True,
        )  # fmt: skip
        return encoded["input_ids"]
    raise ValueError(
        f"train_dataset: row {number}: expected a column 'prompt' with a text or messages, got {type(prompt).__name__}"
    )


def _is_conversation(prompt: object) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in prompt)
    )


def encode_texts(dataset, tokenizer, args) -> list[torch.Tensor]:
    """Token ids of each text of at least two tokens, cut to the length of a prompt and a completion."""
    if (dataset is not None) != (args.ptx_coef > 0):
        raise ValueError(
            f"ptx_dataset: expected it with a ptx_coef above 0 and only then, got ptx_coef {args.ptx_coef}"
        )
    if dataset is None:
        return []
    if tokenizer is None:
        raise ValueError("processing_class: expected a tokenizer for ptx_dataset, got None")
    limit = (args.max_prompt_length or 128) + args.max_completion_length
    texts = [row if isinstance(row, str) else row["text"] for row in dataset]
    encoded = [torch.tensor(tokenizer(text)["input_ids"][:limit]) for text in texts]
    if not (encoded := [ids for ids in encoded if len(ids) > 1]):
        raise ValueError("ptx_dataset: expected a text of two tokens at least, got none")
    return encoded


class RolloutBatches:
    """Which prompts each process gets, micro-batch by micro-batch: a batch sampler that accelerate shares out.

    A rollout takes ``size`` prompts on each of ``processes``, of a random order of all, and lasts for ``repeats``
    micro-batches: each is a batch for each process in turn, the same ones every time. Of fewer prompts than a rollout
    takes some come again in it; of more, the last that fill no rollout are left out of the epoch.
    """

    def __init__(self, prompts: int, size: int, processes: int, repeats: int, seed: int) -> None:
        self.prompts, self.batch_size, self.processes = prompts, size, processes
        self.repeats, self.seed, self.epoch = repeats, seed, 0
        self.rollouts = max(1, prompts // (size * processes))
        self.drop_last = True
        self.sampler = range(prompts)  # what accelerate looks for

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rollouts * self.repeats * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        of_rollout = self.batch_size * self.processes
        needed = self.rollouts * of_rollout
        order: list[int] = []
        while len(order) < needed:
            order += torch.randperm(self.prompts, generator=generator).tolist()
        for start in range(0, needed, of_rollout):
            chosen = order[start : start + of_rollout]
            parts = [
                chosen[p * self.batch_size : (p + 1) * self.batch_size]
                for p in range(self.processes)
            ]
            for _ in range(self.repeats):
                yield from parts


class Rewards:
    """Reward functions with TRL's signature, and their weighted sum."""

    def __init__(
        self,
        functions: Callable | Sequence[Callable] | None,
        weights: list[float] | None,
        tokenizer,
    ) -> None:
        functions = [functions] if callable(functions) else list(functions or ())
        if wrong := [f for f in functions if not callable(f) or isinstance(f, torch.nn.Module)]:
            raise TypeError(
                f"reward_funcs: expected functions, got {type(wrong[0]).__name__}; a reward model is an adapter of the "
                "RoleModel"
            )
        self.functions, self.tokenizer = functions, tokenizer
        self.weights = [1.0] * len(functions) if weights is None else list(weights)
        if len(self.weights) != len(functions):
            raise ValueError(
                f"reward_weights: expected one for each of {len(functions)} reward functions, got {len(self.weights)}"
            )

    def __call__(
        self, rows: list[dict], completion_ids: list[list[int]]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The score of each completion, and each function's mean."""
        columns = {
            name: [row.get(name) for row in rows]
            for name in rows[0]
            if name not in ("prompt", "prompt_ids", "completion", "completion_ids")
        }
        prompts = [row.get("prompt", row["prompt_ids"]) for row in rows]
        completions = self._completions(rows, completion_ids)
        total, seen = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.bool)
        means: dict[str, float] = {}
        for number, (function, weight) in enumerate(zip(self.functions, self.weights)):
            name = getattr(function, "__name__", type(function).__name__)
            scores = function(
                prompts=prompts, completions=completions, completion_ids=completion_ids, **columns
            )
            numbers, given = _numbers(scores, len(rows), name)
            total += weight * numbers.nan_to_num(0.0)
            seen |= given
            means[name if name not in means else f"{name}_{number}"] = (
                float(numbers[given].mean()) if bool(given.any()) else 0.0
            )
        if not bool(seen.all()):
            raise ValueError(
                "reward_funcs: expected a number from one of them for each completion, got None from all"
            )
        return total, means

    def _completions(self, rows: list[dict], completion_ids: list[list[int]]) -> list:
        """Texts, as messages where the prompt is made of messages; the ids without a tokenizer."""
        if self.tokenizer is None:
            return completion_ids
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        return [
            [{"role": "assistant", "content": text}]
            if _is_conversation(row.get("prompt"))
            else text
            for row, text in zip(rows, texts)
        ]


def _numbers(scores: object, count: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a reward function returned: numbers, and which of them are not None."""
    if not hasattr(scores, "__len__") or isinstance(scores, str | dict):
        raise TypeError(
            f"reward_funcs: {name}: expected a list of numbers, got {type(scores).__name__}"
        )
    if len(scores) != count:
        raise ValueError(
            f"reward_funcs: {name}: expected {count} numbers, one for each completion, got {len(scores)}"
        )
    given = torch.tensor([score is not None for score in scores])
    try:
        numbers = torch.tensor([math.nan if score is None else float(score) for score in scores])
    except (TypeError, ValueError):
        numbers = torch.full((count,), math.nan)
    if not bool(numbers[given].isfinite().all()):
        raise ValueError(
            f"reward_funcs: {name}: expected finite numbers or None, got some that are neither"
        )
    return numbers, given
