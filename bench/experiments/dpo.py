"""TRL's DPO on the pairs of the reward model of :mod:`bench.experiments.rlhf`: ``python -m bench.experiments.dpo``.

It needs the adapters that the other experiment left in ``build/rlhf``. The policy starts as the SFT adapter, which is
its reference too; the reward model and the gold score look at what it writes. Results: ``dpo.json`` beside this file.
"""

from __future__ import annotations

import pathlib
import statistics

import datasets
import peft
import trl

import lowrank_kernels as lk
from lowrank_kernels import analysis, files, rlhf
from lowrank_kernels.cli import demo_rlhf, models

from . import common
from .rlhf import SIZES

RESULTS = pathlib.Path(__file__).with_suffix(".json")
KINDS = ("reverse_kl", "js_divergence")
STEPS, BETA, SAMPLES = 60, 0.1, 64


def main(argv: list[str] | None = None) -> None:
    """A run for each divergence and seed."""
    parser = common.parser_of("dpo", __doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each divergence (default: 3)")
    args = common.begin(parser, argv)
    _, tokenizer, _ = models.load(None)
    data = demo_rlhf.read(args.out / "data", tokenizer, SIZES)
    document = common.on() | {"steps": STEPS, "beta": BETA, "runs": {}}
    for seed in range(args.seeds):
        for kind in KINDS:
            name = f"{kind}-{seed}"
            folder = args.out / f"dpo-{name}"
            train(tokenizer, data, args.out, folder, kind, seed)
            document["runs"][name] = seen = look_at(tokenizer, data, args.out, folder)
            print(name, {of: round(x, 3) for of, x in seen.items()}, flush=True)
            files.write_json(document, RESULTS)


def train(
    tokenizer, data: demo_rlhf.Data, out: pathlib.Path, folder: pathlib.Path, kind: str, seed: int
) -> None:
    """The adapter goes into ``folder``."""
    model, _, _ = models.load(None)
    lk.replace_linear(model, r=0, progress=False)
    model = peft.PeftModel.from_pretrained(model, out / "sft", is_trainable=True)
    rows = [
        {"prompt": "", "chosen": tokenizer.decode(better), "rejected": tokenizer.decode(worse)}
        for better, worse in data.pairs
    ]
    config = trl.DPOConfig(
        str(folder), max_steps=STEPS, per_device_train_batch_size=SIZES.batch, learning_rate=SIZES.learning_rate,
        beta=BETA, f_divergence_type=kind, seed=seed, report_to="none", save_strategy="no", use_cpu=True,
        disable_tqdm=True, bf16=False, gradient_checkpointing=False, logging_steps=20,
    )  # fmt: skip
    dataset = datasets.Dataset.from_list(rows)
    trainer = trl.DPOTrainer(model, args=config, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(folder)


def look_at(
    tokenizer, data: demo_rlhf.Data, out: pathlib.Path, folder: pathlib.Path
) -> dict[str, float]:
    """Scores and divergence of what the policy writes behind prompts, and how surprised it is by held-out reviews."""
    model, _, _ = models.load(None)
    lk.replace_linear(model, r=0, progress=False)
    roles = rlhf.RoleModel(model, reference=out / "sft", reward=out / "rm", policy=folder)
    sampling = rlhf.Sampling(
        SIZES.completion, 1.0, tokenizer.eos_token_id, demo_rlhf.padding(tokenizer), tuple(range(SAMPLES))
    )  # fmt: skip
    rollout = rlhf.TransformersSampler(roles).generate(data.prompts[-SAMPLES:], 1, sampling)
    where = rollout.of_completion
    scored = roles.score(rollout.ids, rollout.mask, where=where, divergence="kl")
    texts = demo_rlhf.texts_of(tokenizer, rollout)
    lk.load_adapter(model, out / "sft", "sft")
    nll = analysis.forgetting(model, data.held_out, ["sft", "policy"])
    return {
        "score": scored["reward"].mean().item(),
        "gold": statistics.fmean(map(data.gold.score, texts)),
        "kl_exact": (scored["divergence"].where(where, 0).sum() / where.sum()).item(),
        "nll_over_sft": nll["policy"].nll - nll["sft"].nll,
    }


if __name__ == "__main__":
    main()
