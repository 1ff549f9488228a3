"""PPO under several divergences and seeds, from one SFT and one reward adapter: ``python -m bench.experiments.rlhf``.

The stages are those of ``python -m lowrank_kernels demo --rlhf``. Results go to ``rlhf.json`` beside this file after
every run, so that an interrupted one loses nothing; runs that are there already are left alone.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import lowrank_kernels as lk
from lowrank_kernels import analysis, files
from lowrank_kernels.cli import demo_rlhf, models
from lowrank_kernels.cli.demo_parts import ends

from . import common

RESULTS = pathlib.Path(__file__).with_suffix(".json")
RUNS = ("kl", "js", "js_sun2023", "bregman", "none")
KL_COEF = 0.25
SIZES = demo_rlhf.Sizes(sft_steps=90, reward_steps=90, ppo_rollouts=24, learning_rate=6e-4)


def main(argv: list[str] | None = None) -> None:
    """Runs what is missing."""
    parser = common.parser_of("rlhf", __doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each divergence (default: 3)")
    parser.add_argument("--divergences", nargs="+", default=RUNS, help=f"of {', '.join(RUNS)}")
    parser.add_argument("--rollouts", type=int, default=SIZES.ppo_rollouts, help="of each run")
    args = common.begin(parser, argv)
    sizes = dataclasses.replace(SIZES, ppo_rollouts=args.rollouts)
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}
    document |= common.on() | {"sizes": dataclasses.asdict(sizes), "kl_coef": KL_COEF}
    data, tokenizer = _stages(args.out, sizes, document)
    for seed in range(args.seeds):
        for divergence in args.divergences:
            name = f"{divergence}-{seed}"
            if name in document["runs"]:
                continue
            model = _base(sizes)
            lk.load_adapter(model, args.out / "sft", "sft")
            coef = 0.0 if divergence == "none" else KL_COEF
            log, samples = demo_rlhf.ppo(
                model, tokenizer, data, sizes, args.out, divergence, coef, seed
            )
            nll = analysis.forgetting(model, data.held_out, ["sft", "policy"])
            document["runs"][name] = {
                "log": log,
                "nll": {of: row.nll for of, row in nll.items()},
                "mean_rank": analysis.spectrum(model, "policy").mean_rank(),
                "samples": samples[:3],
            }
            files.write_json(document, RESULTS)
            print(name, summary(document["runs"][name]), flush=True)


def summary(run: dict) -> dict[str, float]:
    """Means of the first and the last quarter of a run."""
    found = {}
    for name in ("score", "gold", "kl_exact", "distinct_2"):
        first, last = ends([row[name] for row in run["log"]])
        found |= {f"{name} first": round(first, 3), f"{name} last": round(last, 3)}
    return found | {"nll over sft": round(run["nll"]["policy"] - run["nll"]["sft"], 3)}


def _base(sizes: demo_rlhf.Sizes):
    model, _, _ = models.load(None)
    adapter = dict(r=sizes.rank, lora_alpha=2 * sizes.rank, adapter_name="sft")
    lk.replace_linear(model, **adapter, progress=False)
    return model


def _stages(out: pathlib.Path, sizes: demo_rlhf.Sizes, document: dict):
    """Data and tokenizer; the folders ``sft`` and ``rm`` are made unless they are there."""
    out.mkdir(parents=True, exist_ok=True)
    _, tokenizer, _ = models.load(None)
    data = demo_rlhf.read(out / "data", tokenizer, sizes)
    if not (out / "rm" / "adapter_config.json").exists():
        model = _base(sizes)
        document["sft_loss"] = demo_rlhf.sft(model, data, sizes)
        lk.save_adapter(model, out / "sft", "sft")
        document["reward_accuracy"] = demo_rlhf.reward_model(model, data, sizes, out / "rm")
        files.write_json(document, RESULTS)
        print(f"reward accuracy {document['reward_accuracy']:.3f}", flush=True)
    return data, tokenizer


if __name__ == "__main__":
    main()
