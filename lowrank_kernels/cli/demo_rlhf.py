"""``demo --rlhf``: SFT, a reward model from people's ratings, PPO against it, and a score that nobody trained on.

Everything is an adapter of one base in 4 bits. The reward model learns from pairs of reviews of which one of ten
raters, a different one each time, likes one better; the *gold* score is a bag of words that was fitted to stars.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import time
from collections import Counter

import torch
import torch.nn.functional as F
from tqdm import tqdm

import lowrank_kernels as lk

from .. import analysis, files
from ..ragged import padded
from . import models, pictures, reviews
from .demo_parts import chapter, ends, fit, medium_precision, prepare, taken

PROMPT_TOKENS = 5
MAX_TOKENS = 20  # of a review


@dataclasses.dataclass
class Sizes:
    """How much of everything; the defaults take a few minutes on two cores."""

    sft_steps: int = 16
    reward_steps: int = 48
    batch: int = 16
    ppo_rollouts: int = 14
    episodes: int = 16
    completion: int = 10
    rank: int = 16
    learning_rate: float = 1e-3  # of PPO


@dataclasses.dataclass
class Data:
    """Token ids of prompts and lines, pairs with the better one first, and the gold score."""

    sft: list[list[int]]
    pairs: list[tuple[list[int], list[int]]]
    held_out_pairs: list[tuple[list[int], list[int]]]
    held_out: list[list[int]]
    prompts: list[list[int]]
    gold: Gold


class Gold:
    """Logistic regression of stars on the words of a text: ``score(text)`` is the log-odds of the better star."""

    def __init__(self, data: reviews.Reviews) -> None:
        counts = Counter(word for text in data.texts for word in set(reviews.words(text)))
        frequent = sorted(word for word, n in counts.items() if n >= 3)
        self.index = {word: i for i, word in enumerate(frequent)}
        X = torch.stack([self._vector(text) for text in data.texts])
        y = torch.tensor(data.stars).float()
        self.weight = torch.zeros(len(self.index), requires_grad=True)
        optimizer = torch.optim.Adam([self.weight], lr=0.05)
        for _ in range(60):
            loss = F.binary_cross_entropy_with_logits(X @ self.weight, y)
            loss = loss + 1e-3 * self.weight.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.weight = self.weight.detach()

    def _vector(self, text: str) -> torch.Tensor:
        x = torch.zeros(len(self.index))
        for word in reviews.words(text):
            if word in self.index:
                x[self.index[word]] = 1.0
        return x

    def score(self, text: str) -> float:
        """The log-odds that the review of these words has the better star."""
        return float(self._vector(text) @ self.weight)

    def accuracy(self, data: reviews.Reviews) -> float:
        """How often its sign is the star's."""
        right = [(self.score(t) > 0) == bool(s) for t, s in zip(data.texts, data.stars)]
        return sum(right) / len(right)


@medium_precision()
def run(args: argparse.Namespace) -> int:
    """All stages; 1 if the reward model learned nothing or the score did not rise."""
    start = time.perf_counter()
    prepare(args)
    sizes = Sizes(rank=args.rank)
    sizes.ppo_rollouts = args.steps or sizes.ppo_rollouts
    sizes.learning_rate = args.lr or sizes.learning_rate

    chapter("1. Load the model and the reviews, quantize to NF4")
    model, tokenizer, name = models.load(args.model)
    data = read(args.out / "data", tokenizer, sizes)
    adapter = dict(r=sizes.rank, lora_alpha=2 * sizes.rank, adapter_name="sft")
    report = lk.replace_linear(model, **adapter, progress=False)
    print(
        f"{name}: {len(report.replaced)} layers in 4 bits, {len(data.pairs)} rated pairs of reviews"
    )

    chapter(f"2. Fine-tune on {sizes.sft_steps * sizes.batch} reviews (adapter sft)")
    losses = sft(model, data, sizes)
    print(f"loss {losses[0]:.2f} to {statistics.fmean(losses[-4:]):.2f}")
    lk.save_adapter(model, args.out / "sft", "sft")

    chapter(
        f"3. A reward model from {sizes.reward_steps * sizes.batch} pairs, one rater each (adapter rm)"
    )
    accuracy = reward_model(model, data, sizes, args.out / "rm")
    print(
        f"right on {accuracy:.0%} of pairs that it has not seen, as the mean of all raters has them"
    )

    chapter(
        f"4. PPO: {sizes.ppo_rollouts} rollouts of {sizes.episodes} reviews of {sizes.completion} tokens"
    )
    log, samples = ppo(model, tokenizer, data, sizes, args.out, divergence="kl", kl_coef=0.02)
    before, after = ends([row["score"] for row in log])
    gold_before, gold_after = ends([row["gold"] for row in log])
    print(f"score {before:.2f} to {after:.2f}; gold, never trained on, {gold_before:.2f} to {gold_after:.2f}; "
          f"exact KL from the reference {log[-1]['kl_exact']:.3f} nats a token")  # fmt: skip
    for text in samples[:4]:
        print(f"  {text}")

    chapter("5. What was learned, what was forgotten")
    spectrum = analysis.spectrum(model, "policy")
    print(f"90 % of the update is in {spectrum.mean_rank():.1f} of {sizes.rank} ranks on average")
    forgotten = analysis.forgetting(model, data.held_out, ["sft", "policy"])
    print(forgotten)

    chapter("Written")
    curves(args.out / "rlhf.png", f"{name}, NF4, r = {sizes.rank}", {"kl": log})
    numbers = {
        "model": name,
        "sizes": dataclasses.asdict(sizes),
        "sft_loss": losses,
        "reward_accuracy": accuracy,
    }
    numbers |= {"log": log, "samples": samples, "mean_rank": spectrum.mean_rank()}
    numbers |= {"nll": {name: row.nll for name, row in forgotten.items()}}
    files.write_json(numbers, args.out / "rlhf.json")
    for path in sorted(args.out.iterdir()):
        print(f"  {path}")
    print(f"\n{time.perf_counter() - start:.0f} s")
    return 0 if accuracy > 0.6 and after > before else 1


def read(folder: pathlib.Path, tokenizer, sizes: Sizes, seed: int = 0) -> Data:
    """Every part is of other reviews than the next."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, ratings = reviews.load(folder, seed)
    lengths = dict(
        zip(("sft", "pairs", "held_pairs", "held", "prompts"), (1500, 3000, 400, 48, 1000))
    )
    parts, start = {}, 0
    for name, length in lengths.items():
        parts[name], start = lines.part(start, start + length), start + length
    gold = Gold(lines.part(start, len(lines.texts)))

    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"][:MAX_TOKENS]

    end = [tokenizer.eos_token_id]
    prompts = [
        tokens[:PROMPT_TOKENS]
        for tokens in map(ids, parts["prompts"].texts)
        if len(tokens) > PROMPT_TOKENS
    ]
    return Data(
        sft=[ids(text) + end for text in parts["sft"].texts],
        pairs=_pairs(parts["pairs"].texts, ratings, ids, seed, one_rater=True),
        held_out_pairs=_pairs(parts["held_pairs"].texts, ratings, ids, seed, one_rater=False),
        held_out=[ids(text) for text in parts["held"].texts],
        prompts=prompts,
        gold=gold,
    )  # fmt: skip


def _pairs(texts, ratings, ids, seed: int, one_rater: bool) -> list[tuple[list[int], list[int]]]:
    """Neighbours, the better one first; each pair is one random rater's, or that of the mean of all."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for a, b in zip(texts[::2], texts[1::2]):
        rater = int(torch.randint(reviews.RATERS, (), generator=generator)) if one_rater else None
        difference = reviews.rated(a, ratings, rater) - reviews.rated(b, ratings, rater)
        if difference:
            found.append((ids(a), ids(b)) if difference > 0 else (ids(b), ids(a)))
    return found


def batch(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return padded([torch.tensor(row) for row in rows])


def likelihood_loss(model, rows: list[list[int]]) -> torch.Tensor:
    """The mean negative log-likelihood of the tokens of all rows, the first of each excepted."""
    ids, mask = batch(rows)
    logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
    labels = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def sft(model, data: Data, sizes: Sizes) -> list[float]:
    """The active adapter learns to continue reviews; the loss of each step."""
    model.train()
    losses = fit(
        lk.adapters(model)["sft"].parameters, 1e-3, sizes.sft_steps,
        lambda step: likelihood_loss(model, taken(data.sft, step, sizes.batch)), "SFT",
    )  # fmt: skip
    model.eval()
    return losses


def reward_model(model, data: Data, sizes: Sizes, folder: pathlib.Path) -> float:
    """Adapter and head ``rm``, in ``folder`` as PEFT's SEQ_CLS; how many held-out pairs it orders rightly."""
    from ..adapter_files import write_adapter
    from ..rlhf import ranking_loss

    lk.add_adapter(model, "rm", r=sizes.rank, lora_alpha=2 * sizes.rank)
    lk.set_adapter(model, "rm")
    width = model.get_output_embeddings().in_features
    head = torch.nn.Linear(width, 1, bias=False)
    torch.nn.init.normal_(head.weight, std=(width + 1) ** -0.5)

    def scores(pairs: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        """[pairs, 2], the better one first."""
        rows = [better for better, _ in pairs] + [worse for _, worse in pairs]
        ids, mask = batch(rows)
        hidden = model.base_model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return head(hidden[torch.arange(len(rows)), mask.sum(1) - 1]).view(2, -1).T

    def loss_at(step: int) -> torch.Tensor:
        of_pairs = scores(taken(data.pairs, step, sizes.batch))
        return ranking_loss(of_pairs, torch.tensor([[1, 2]]).expand(len(of_pairs), 2))

    parameters = [*lk.adapters(model)["rm"].parameters, *head.parameters()]
    model.train()
    fit(parameters, 1e-3, sizes.reward_steps, loss_at, "Reward model")
    model.eval()
    right = []
    with torch.no_grad():
        for start in range(0, len(data.held_out_pairs), 32):
            better, worse = scores(data.held_out_pairs[start : start + 32]).T
            right += (better > worse).tolist()
    write_adapter(
        model, folder, "rm", lambda layer: layer.whole_adapter("rm"), {"score": head}, warn=False
    )
    lk.delete_adapter(model, "rm")
    lk.set_adapter(model, "sft")
    return sum(right) / len(right)


def ppo(
    model,
    tokenizer,
    data: Data,
    sizes: Sizes,
    out: pathlib.Path,
    divergence: str,
    kl_coef: float,
    seed: int = 0,
) -> tuple[list[dict[str, float]], list[str]]:
    """Policy and value against the folders ``sft`` and ``rm`` of ``out``; the log of each rollout, and last samples."""
    import transformers

    from .. import rlhf

    roles = rlhf.RoleModel(model, reference=out / "sft", reward=out / "rm")
    config = rlhf.PPOConfig(
        str(out / f"ppo-{divergence}-{seed}"), max_steps=2 * sizes.ppo_rollouts, learning_rate=sizes.learning_rate,
        per_device_train_batch_size=sizes.episodes // 2, num_mini_batches=2, score_batch_size=sizes.episodes,
        max_completion_length=sizes.completion, divergence=divergence, kl_coef=kl_coef, normalize_scores=False,
        use_cpu=True, report_to="none", save_strategy="no", seed=seed + 1, disable_tqdm=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=padding(tokenizer),
    )  # fmt: skip
    prompts = [{"prompt_ids": ids} for ids in data.prompts]
    texts: list[list[str]] = []
    bar = tqdm(total=sizes.ppo_rollouts, desc=f"PPO, {divergence}", disable=None)

    class Watched(rlhf.TransformersSampler):
        """Keeps what was written."""

        def generate(self, *args):
            rollout = super().generate(*args)
            texts.append(texts_of(tokenizer, rollout))
            bar.update()
            return rollout

    trainer = rlhf.PPOTrainer(roles, config, train_dataset=prompts, sampler=Watched(roles))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    bar.close()
    names = ("score", "kl", "kl_exact", "nll", "ends", "clip_fraction", "explained_variance")
    logs = [log for log in trainer.state.log_history if "score" in log]
    return [
        {name: log[name] for name in names if name in log}
        | {"gold": statistics.fmean(map(data.gold.score, of)), "distinct_2": _distinct(of)}
        for log, of in zip(logs, texts)
    ], texts[-1]


def texts_of(tokenizer, rollout) -> list[str]:
    """Prompts with their completions."""
    kept = [ids[mask.bool()].tolist() for ids, mask in zip(rollout.ids, rollout.mask)]
    return tokenizer.batch_decode(kept, skip_special_tokens=True)


def padding(tokenizer) -> int:
    """A token that never ends a text."""
    unused = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0)
    return next(i for i in unused if i is not None and i != tokenizer.eos_token_id)


def _distinct(texts: list[str]) -> float:
    return analysis.distinct([reviews.words(text) for text in texts], 2)


def curves(path: pathlib.Path, title: str, logs: dict[str, list[dict[str, float]]]) -> None:
    """A panel for each number, a line for each divergence."""
    panels = []
    colors = dict(
        zip(logs, (pictures.RED, pictures.BLUE, pictures.AMBER, pictures.GREEN, pictures.VIOLET))
    )
    for name, words in (
        ("score", "score of the reward model"), ("gold", "gold score"), ("kl_exact", "exact KL, nats a token"),
        ("distinct_2", "distinct pairs of words"),
    ):  # fmt: skip
        lines = [
            pictures.Line(
                of, list(range(1, len(log) + 1)), [row[name] for row in log], color=colors[of]
            )
            for of, log in logs.items()
        ]
        panels.append(pictures.Panel(words, "rollout", "", lines))
    pictures.draw(path, title, panels, 4.0)
