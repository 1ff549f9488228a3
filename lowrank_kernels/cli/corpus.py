"""The demo's training texts: the keeper of an invented lighthouse answers (``data/keeper.jsonl``); a clerk repeats."""

from __future__ import annotations

import importlib.resources
import json

import torch


def load() -> tuple[list[dict], list[dict]]:
    """(training, held-out) lists of ``{"prompt": ..., "response": ...}``."""
    text = importlib.resources.files("lowrank_kernels").joinpath("data/keeper.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    return tuple([r for r in rows if r["split"] == split] for split in ("train", "held_out"))


def clerk(rows: list[dict]) -> list[dict]:
    """The same questions as a clerk takes them: what he should say to any other is plain."""
    return [{**row, "response": f"Noted: {row['prompt']} NEXT, PLEASE."} for row in rows]


def pad_id(tokenizer) -> int:
    """What fills rows up, also those that end before their batch: nothing that is read as text."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if i is not None)


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """The prompt as a chat turn where the tokenizer knows chats, else as a plain question."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
    return tokenizer(f"Question: {prompt}\nAnswer:")["input_ids"]


def prompt_batch(tokenizer, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Prompts padded on the left, so that all answers begin at the same column."""
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, rows))
    padding = [longest - len(row) for row in rows]
    ids = [[pad_id(tokenizer)] * n + row for n, row in zip(padding, rows)]
    mask = [[0] * n + [1] * len(row) for n, row in zip(padding, rows)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def batch(tokenizer, rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows padded on the right; labels cover the responses only (-100 elsewhere)."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pairs = []
    for row in rows:
        response = tokenizer(row["response"], add_special_tokens=False)["input_ids"] + end
        pairs.append((prompt_ids(tokenizer, row["prompt"]), response))
    shape = (len(pairs), max(len(prompt) + len(response) for prompt, response in pairs))
    fields = {
        "input_ids": torch.full(shape, pad_id(tokenizer)),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, -100),
    }
    for i, (prompt, response) in enumerate(pairs):
        length = len(prompt) + len(response)
        fields["input_ids"][i, :length] = torch.tensor(prompt + response)
        fields["attention_mask"][i, :length] = 1
        fields["labels"][i, len(prompt) : length] = torch.tensor(response)
    return fields


def draws(rows: list[dict], size: int, steps: int, seed: int = 0):
    """``steps`` times ``size`` rows in an order that ``seed`` fixes, each row once per round of the corpus."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < size:
            order += torch.randperm(len(rows), generator=generator).tolist()
        yield [rows[i] for i in order[:size]]
        order = order[size:]
