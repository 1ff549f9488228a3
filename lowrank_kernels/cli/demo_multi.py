"""The demo's chapter on many adapters: two train in the same batches, then answer beside the base in one pass."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import pathlib
import statistics
import textwrap
import time
from collections.abc import Sequence

import torch
from torch.nn import functional as F
from tqdm import tqdm

import lowrank_kernels as lk
from lowrank_kernels.nn import lora_layers

from . import corpus, models
from .demo_parts import LOOK_EVERY, adamw, loss_fell

RANKS = {"keeper": 8, "clerk": 4}  # two adapters and their ranks
EXAMPLES = [3, 1]  # of each in a batch: the clerk's task is the easier one
RATE = 4e-3  # small adapters learn at a higher rate
ROUNDING = 1e-4  # of the largest logit: float32 sums in another order, through all layers


@dataclasses.dataclass
class Row:
    """A row of the mixed batch, and how it compares."""

    adapter: str | None
    prompt: str
    answer: str = ""
    same_text_alone: bool = False
    logits_differ_alone: float = float("nan")  # largest difference of any logit of any step
    same_bits_among_others: bool = False


def run(
    model: torch.nn.Module, tokenizer, prompts: Sequence[str], args: argparse.Namespace
) -> tuple[dict, list[str]]:
    """(numbers, what is not as it should be), all of it printed. ``model`` stays as it is."""
    model = copy.deepcopy(model)
    losses = train(model, tokenizer, args.steps)
    bank = reload(model, args.out / "adapters")
    rows = [Row(name, prompt) for prompt in prompts for name in (*RANKS, None)]
    seconds, largest = compare(model, tokenizer, bank, rows)
    show(rows, seconds, largest)

    problems = [
        f"the loss of adapter {name!r} did not fall"
        for name, of_adapter in losses.items()
        if not loss_fell(of_adapter)
    ]
    for row in rows:
        where = f"row {row.adapter or 'base alone'!r}, {row.prompt!r}, of the mixed batch"
        if not row.same_text_alone:
            problems.append(f"{where}: another answer than alone")
        if not row.logits_differ_alone <= ROUNDING * largest:
            problems.append(f"{where}: other logits than alone")
        if not row.same_bits_among_others:
            problems.append(f"{where}: its bits depend on the adapters of the others")
    numbers = {"ranks": RANKS, "loss": losses, "seconds": seconds, "largest_logit": largest}
    return numbers | {"rows": [dataclasses.asdict(row) for row in rows]}, problems


# -- training together -----------------------------------------------------------------------------


def train(model: torch.nn.Module, tokenizer, steps: int) -> dict[str, list[float]]:
    """Adds the adapters and trains both at once; prints a table. name -> its loss at every step."""
    torch.manual_seed(0)
    for name, rank in RANKS.items():
        for layer in lora_layers(model).values():
            layer.add_adapter(name, r=rank, lora_alpha=2 * rank)
    bank = lk.AdapterBank.for_model(model, num_pages=len(RANKS))
    for name in RANKS:
        bank.load(name)  # the model's own: its pages follow the parameters
    optimizer, schedule = adamw(bank.trainable(*RANKS), RATE, steps)
    keeper, _ = corpus.load()
    tasks = zip((keeper, corpus.clerk(keeper)), EXAMPLES)
    draws = (corpus.draws(rows, count, steps) for rows, count in tasks)
    ranks = ", ".join(f"{name} r = {rank}" for name, rank in RANKS.items())
    counts = " + ".join(map(str, EXAMPLES))
    print(f"  {ranks}: {steps} steps of {counts} examples in one batch")
    print(f"  {'step':>4}  " + "  ".join(f"{name:>6}" for name in RANKS), flush=True)
    losses: dict[str, list[float]] = {name: [] for name in RANKS}
    with tqdm(zip(*draws), total=steps, desc="Training", unit="step") as bar:
        for step, drawn in enumerate(bar, 1):
            batch = corpus.batch(tokenizer, [row for rows in drawn for row in rows])
            for name, loss in zip(RANKS, backward(model, bank, batch)):
                losses[name].append(loss)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % LOOK_EVERY == 0 or step == steps:
                recent = (statistics.fmean(of[-LOOK_EVERY:]) for of in losses.values())
                bar.write(f"  {step:4}  " + "  ".join(f"{loss:6.3f}" for loss in recent))
    return losses


def backward(model, bank: lk.AdapterBank, batch: dict[str, torch.Tensor]) -> list[float]:
    """The loss of each adapter, whose examples follow one another; the gradients of both in one pass.

    Rows share nothing but the frozen base, so of the sum each adapter gets the gradient of its own loss.
    """
    labels = batch.pop("labels")
    names = [name for name, count in zip(RANKS, EXAMPLES) for _ in range(count)]
    with bank.using(bank.plan(names, tokens_per_sequence=[labels.shape[1]] * len(names))):
        logits = model.train()(**batch, use_cache=False).logits
        losses = [
            F.cross_entropy(of_rows[:, :-1].flatten(0, 1), wanted[:, 1:].flatten())
            for of_rows, wanted in zip(logits.split(EXAMPLES), labels.split(EXAMPLES))
        ]
        sum(losses).backward()
    return [loss.item() for loss in losses]


def reload(model: torch.nn.Module, folder: pathlib.Path) -> lk.AdapterBank:
    """A fresh bank with the adapters as they were saved to ``folder``, in PEFT's format."""
    bank = lk.AdapterBank.for_model(model, num_pages=len(RANKS))
    for name in RANKS:
        lk.save_adapter(model, folder / name, name)
        bank.load(name, folder / name)
    print(f"  Saved to {folder} in PEFT's format, loaded into a fresh bank:\n    {bank}")
    return bank


# -- answering together ----------------------------------------------------------------------------


def answer(
    model, tokenizer, bank: lk.AdapterBank, adapters: list[str | None], prompts: list[str]
) -> tuple[list[str], torch.Tensor]:
    """Texts and logits of every step: one ``generate`` under one plan, for its prefill and for all its steps."""
    tokens = corpus.prompt_batch(tokenizer, prompts)["input_ids"].shape[1]
    with bank.using(bank.plan(adapters, tokens_per_sequence=[tokens] * len(adapters))):
        return models.answer(model, tokenizer, prompts)


def compare(model, tokenizer, bank: lk.AdapterBank, rows: list[Row]) -> tuple[dict, float]:
    """Answers all rows at once and compares. (seconds, largest logit)."""
    adapters, prompts = [row.adapter for row in rows], [row.prompt for row in rows]
    start = time.perf_counter()
    texts, logits = answer(model, tokenizer, bank, adapters, prompts)
    seconds = {"together": time.perf_counter() - start}

    # Alone: no bank, no padding, one row; its adapter is active in the layers.
    own = []  # the logits of each row until its answer ends
    start = time.perf_counter()
    for row, text, of_row in zip(rows, texts, logits):
        activate(model, row.adapter)
        [alone], [expected] = models.answer(model, tokenizer, [row.prompt])
        own.append(of_row[: len(expected)])
        row.answer, row.same_text_alone = text, alone == text
        difference = own[-1] - expected[: len(own[-1])]
        row.logits_differ_alone = difference.abs().max().item()
    seconds["one after another"] = time.perf_counter() - start

    # Among others: the same prompts, while the rows of the other adapters exchange theirs.
    choices = set(adapters)
    for kept in choices:
        others = sorted(choices - {kept}, key=str)
        exchanged = {kept: kept} | dict(zip(others, reversed(others)))
        _, again = answer(model, tokenizer, bank, [exchanged[name] for name in adapters], prompts)
        for row, expected, of_row in zip(rows, own, again):
            if row.adapter == kept:
                row.same_bits_among_others = torch.equal(of_row[: len(expected)], expected)
    return seconds, logits.abs().max().item()


def activate(model: torch.nn.Module, name: str | None) -> None:
    for layer in lora_layers(model).values():
        layer.set_adapter(name or "none of them")  # under a name that it lacks a layer is its base


def show(rows: list[Row], seconds: dict[str, float], largest: float) -> None:
    for prompt in dict.fromkeys(row.prompt for row in rows):
        print(f"\n  > {prompt}")
        for row in rows:
            if row.prompt == prompt:
                label = f"    {row.adapter or '(base)':8} "
                lines = textwrap.fill(row.answer, 92 - len(label))
                print(label + textwrap.indent(lines, " " * len(label)).strip())
    count = len(rows)
    same_text = sum(row.same_text_alone for row in rows)
    same_bits = sum(row.same_bits_among_others for row in rows)
    difference = max(row.logits_differ_alone for row in rows)
    times = ", ".join(f"{way} {s:.1f} s" for way, s in seconds.items())
    print(f"\n  All {count} rows in one pass: {times}")
    print("  Each row alone, unpadded, its adapter active in the layers, no bank:")
    print(f"    the same text: {same_text} of {count}")
    print(f"    logits of all steps: at most {difference:.1e} apart, the largest is {largest:.1f}")
    print("  Each row among the same prompts, the other rows' adapters exchanged:")
    print(f"    bit-identical logits in all steps: {same_bits} of {count}", flush=True)
