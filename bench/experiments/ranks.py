"""Learning against forgetting by rank, and in full fine-tuning: ``python -m bench.experiments.ranks``.

SmolLM2 learns to continue film reviews. *Learned* is how much less held-out reviews surprise it, *forgotten* how much
more the docstrings of Python's standard library do, in nats per token. Results: ``ranks.json`` beside this file.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pathlib
import pkgutil
import random

import torch

import lowrank_kernels as lk
from lowrank_kernels import analysis, files
from lowrank_kernels.cli import demo_rlhf, models
from lowrank_kernels.cli.demo_parts import fit, taken
from lowrank_kernels.cli.demo_rlhf import likelihood_loss

from . import common

RESULTS = pathlib.Path(__file__).with_suffix(".json")
RANKS = (1, 4, 16, 64, 256)
RATES = {"lora": (3e-4, 1e-3), "full": (3e-5, 1e-4)}
STEPS, BATCH, TEXTS = 90, 16, 48
LEFT_OUT = ("antigravity", "this", "idlelib", "turtledemo", "tkinter", "turtle")


def main(argv: list[str] | None = None) -> None:
    """Runs what is missing."""
    args = common.begin(common.parser_of("ranks", __doc__), argv)
    _, tokenizer, _ = models.load(None)
    data = demo_rlhf.read(args.out / "data", tokenizer, demo_rlhf.Sizes())
    other = [tokenizer(text)["input_ids"][:64] for text in docstrings(TEXTS)]
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}
    document |= common.on() | {"steps": STEPS, "batch": BATCH}
    for rank in (*RANKS, None):
        for rate in RATES["lora" if rank else "full"]:
            name = f"{f'r={rank}' if rank else 'full'}, {rate:g}"
            if name not in document["runs"]:
                document["runs"][name] = run(data, other, rank, rate)
                print(name, document["runs"][name], flush=True)
                files.write_json(document, RESULTS)


def docstrings(count: int) -> list[str]:
    """Of modules and functions of the standard library, at least 200 characters each, always the same ones."""
    found = []
    for module in sorted(
        m.name for m in pkgutil.iter_modules([pathlib.Path(json.__file__).parents[1]])
    ):
        if module.startswith("_") or module in LEFT_OUT:
            continue
        try:
            loaded = importlib.import_module(module)
        except ImportError:
            continue
        members = [
            of
            for _, of in inspect.getmembers(loaded, inspect.isfunction)
            if of.__module__ == module
        ]
        found += [text for of in (loaded, *members) if len(text := inspect.getdoc(of) or "") >= 200]
    return random.Random(0).sample(sorted(set(found)), count)


def run(
    data: demo_rlhf.Data, other: list[list[int]], rank: int | None, rate: float
) -> dict[str, float]:
    """Trains, and compares with the model before."""
    torch.manual_seed(0)
    model, _, _ = models.load(None)
    lk.replace_linear(model, r=rank or 1, lora_alpha=2 * (rank or 1), progress=False)
    if rank is None:  # the same rounded weights, dense, all of them trained
        for path, layer in list(model.named_modules()):
            if isinstance(layer, lk.LoRALinear4bit):
                dense = torch.nn.Linear(
                    layer.in_features, layer.out_features, layer.bias is not None
                )
                dense.weight.data.copy_(layer.dequantize())
                model.set_submodule(path, dense)
    parameters = [p for p in model.parameters() if rank is None or p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(True)
    before = nll(model, data.held_out), nll(model, other)
    model.train()
    words = f"r = {rank}" if rank else "full"
    fit(
        parameters,
        rate,
        STEPS,
        lambda step: likelihood_loss(model, taken(data.sft, step, BATCH)),
        words,
    )
    after = nll(model, data.held_out), nll(model, other)
    found = {"learned": before[0] - after[0], "forgotten": after[1] - before[1]}
    if rank:
        found["mean_rank"] = analysis.spectrum(model).mean_rank()
    return {name: round(value, 4) for name, value in found.items()}


@torch.no_grad()
def nll(model, texts: list[list[int]]) -> float:
    """The mean over the tokens of all texts."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(texts), 16):
        rows = texts[start : start + 16]
        tokens = sum(len(row) - 1 for row in rows)
        total, count = total + tokens * likelihood_loss(model, rows).item(), count + tokens
    return total / count


if __name__ == "__main__":
    main()
