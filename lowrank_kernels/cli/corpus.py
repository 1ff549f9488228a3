"""The demo's training text, ``data/keeper.jsonl``: the keeper of an invented lighthouse answers."""

from __future__ import annotations

import importlib.resources
import json

import torch


def load() -> tuple[list[dict], list[dict]]:
    """(training, held-out) lists of ``{"prompt": ..., "response": ...}``."""
    text = importlib.resources.files("lowrank_kernels").joinpath("data/keeper.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    return tuple([r for r in rows if r["split"] == split] for split in ("train", "held_out"))


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """The prompt as a chat turn where the tokenizer knows chats, else as a plain question."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
    return tokenizer(f"Question: {prompt}\nAnswer:")["input_ids"]


def batch(tokenizer, rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows padded on the right; labels cover the responses only (-100 elsewhere)."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pairs = []
    for row in rows:
        response = tokenizer(row["response"], add_special_tokens=False)["input_ids"] + end
        pairs.append((prompt_ids(tokenizer, row["prompt"]), response))
    shape = (len(pairs), max(len(prompt) + len(response) for prompt, response in pairs))
    fields = {
        "input_ids": torch.full(shape, tokenizer.pad_token_id or 0),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, -100),
    }
    for i, (prompt, response) in enumerate(pairs):
        length = len(prompt) + len(response)
        fields["input_ids"][i, :length] = torch.tensor(prompt + response)
        fields["attention_mask"][i, :length] = 1
        fields["labels"][i, len(prompt) : length] = torch.tensor(response)
    return fields


def batches(rows: list[dict], tokenizer, size: int, steps: int, seed: int = 0):
    """``steps`` batches in an order that ``seed`` fixes, each row once per round of the corpus."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < size:
            order += torch.randperm(len(rows), generator=generator).tolist()
        yield batch(tokenizer, [rows[i] for i in order[:size]])
        order = order[size:]
