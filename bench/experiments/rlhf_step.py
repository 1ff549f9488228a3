"""What one base for four roles saves in PPO: ``python -m bench.experiments.rlhf_step``.

Ratios within one run, each a median of alternating calls:

- scoring: one mixed forward of four roles against four forwards with ``set_adapter``, on the same layers;
- training: one backward of policy and value against two;
- a PPO step, the sum of sampling, scoring and training: this library against the same written with PEFT and
  bitsandbytes, whose adapters are switched by ``set_adapter``, on the same bytes, prompts and number of tokens.

All models have random weights; float32 activations under torch's "medium" precision, since bitsandbytes multiplies
bfloat16 numbers on CPUs that have such products, whatever the dtype is.
"""

from __future__ import annotations

import argparse
import copy
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

import lowrank_kernels as lk
from lowrank_kernels import files, rlhf
from lowrank_kernels.benchmark import machine, models

ROLES = list(rlhf.ROLES)
SCORED = ((1, 4), (1, 16), (4, 16), (8, 64))  # sequences, tokens of each
TRAINED = ((1, 16), (4, 16), (8, 64))
PROMPTS, PROMPT, COMPLETION = 8, 8, 16
SAMPLING = {
    "max_new_tokens": COMPLETION, "min_new_tokens": COMPLETION, "do_sample": True, "top_k": 0, "top_p": 1.0,
    "pad_token_id": 0, "use_cache": True,
}  # fmt: skip


def alternating(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median seconds of each call, which take turns."""
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:  # the first one is a warm-up
                seen[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in seen.items()}


def role_model(base: torch.nn.Module, rank: int) -> rlhf.RoleModel:
    """Four adapters of random values."""
    first = rlhf.RoleModel(copy.deepcopy(base), r=rank)
    randomize(first)
    with tempfile.TemporaryDirectory() as folder:
        first.save(folder)
        made = rlhf.RoleModel(base, reference=f"{folder}/policy", reward=f"{folder}/value")
    return made.train()


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "value_head" in name:
            parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))


def losses(out: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(tensor.float().square().mean() for tensor in out.values())


class Separate:
    """The same four roles by ``set_adapter``, one forward after another, as PEFT's users write it."""

    def __init__(
        self, model: torch.nn.Module, switch: Callable[[str], None], head: torch.nn.Linear
    ):
        self.model, self.switch, self.head = model, switch, head

    def role(self, role: str, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.switch(role)
        batch = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if role in ("policy", "reference"):
            logits = self.model(**batch).logits[:, :-1].float()
            return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        causal = getattr(self.model, "base_model", self.model)
        body = getattr(causal, "model", causal)
        hidden = getattr(body, "model", body)(**batch).last_hidden_state
        value = self.head(hidden.float())[..., 0]
        return value if role == "value" else value[:, -1]

    def score(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {role: self.role(role, ids, mask) for role in ROLES}

    def train(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        for role in ("policy", "value"):
            self.role(role, ids, mask).float().square().mean().backward()

    def generate(self, prompts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.switch("policy")
        with torch.no_grad():
            return self.model.generate(input_ids=prompts, attention_mask=mask, **SAMPLING)


def batch_of(rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask; every second sequence is one token shorter, and padded on its left as prompts are."""
    ids = models.random_batch(models.VOCABULARY, "cpu", rows, tokens)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1::2, 0] = 0
    return ids, mask


def ours_by_switching(roles: rlhf.RoleModel) -> Separate:
    """On the layers of a RoleModel; reference and reward are given the adapters of policy and value."""
    of = {"reference": "policy", "reward": "value"}
    switch = lambda role: lk.set_adapter(roles.model, of.get(role, role))  # noqa: E731
    return Separate(roles.model, switch, roles.value_head)


def peft_on_bitsandbytes(name: str, rank: int, width: int) -> list[Separate] | str:
    """Four PEFT adapters on bitsandbytes' layers, one model in evaluation mode and one in training mode; or why not.

    After a call in evaluation mode bitsandbytes' layers pass no gradient on these CPUs.
    """
    made = models.contenders(models.random_model(name), rank, [models.BITSANDBYTES])
    model = made[models.BITSANDBYTES]
    if isinstance(model, str):
        return model
    for role in ROLES:
        model.add_adapter(role, model.peft_config["default"])
    randomize(model)
    head = torch.nn.Linear(width, 1, bias=False)
    both = copy.deepcopy(model).eval(), model.train()
    return [Separate(model, model.set_adapter, head) for model in both]


def scoring(roles: rlhf.RoleModel, one_by_one: Separate, repeats: int) -> list[dict]:
    found = []
    for rows, tokens in SCORED:
        batch = batch_of(rows, tokens)
        calls = {
            "mixed": lambda batch=batch: roles.score(*batch, ROLES),
            "set_adapter": lambda batch=batch: one_by_one.score(*batch),
        }
        seconds = alternating(calls, repeats)
        lk.set_adapter(roles.model, "policy")
        found.append(case("scoring", rows, tokens, seconds, "set_adapter", "mixed"))
    return found


def training(roles: rlhf.RoleModel, repeats: int) -> list[dict]:
    def backward(batch: tuple[torch.Tensor, torch.Tensor], *wanted: list[str]) -> None:
        roles.zero_grad()
        for some in wanted:
            losses(roles(*batch, some)).backward()

    found = []
    roles.bank.trainable("policy", "value")
    for rows, tokens in TRAINED:
        batch = batch_of(rows, tokens)
        calls = {
            "joint": lambda batch=batch: backward(batch, ["policy", "value"]),
            "separate": lambda batch=batch: backward(batch, ["policy"], ["value"]),
        }
        found.append(
            case("training", rows, tokens, alternating(calls, repeats), "separate", "joint")
        )
    return found


def steps(roles: rlhf.RoleModel, peers: list[Separate], repeats: int) -> list[dict]:
    """A step of PPO, and its three parts."""
    prompts, mask = batch_of(PROMPTS, PROMPT)
    full = torch.cat([mask, torch.ones(PROMPTS, COMPLETION, dtype=mask.dtype)], 1)
    answering, learning = peers
    ids = roles.generate(prompts, mask, **SAMPLING)

    def train_ours() -> None:
        roles.zero_grad()
        losses(roles(ids, full)).backward()

    def train_theirs() -> None:
        learning.model.zero_grad()
        learning.train(ids, full)

    train_theirs()
    parameters = learning.model.named_parameters()
    without = [n for n, p in parameters if "lora_A.policy" in n and p.grad is None]
    assert not without, f"no gradient reaches {without}"
    parts = {
        "sample": (lambda: roles.generate(prompts, mask, **SAMPLING), lambda: answering.generate(prompts, mask)),
        "score": (lambda: roles.score(ids, full, ROLES), lambda: answering.score(ids, full)),
        "train": (train_ours, train_theirs),
    }  # fmt: skip
    names, found = ("lowrank_kernels", "peft + bitsandbytes"), []
    total = dict.fromkeys(names, 0.0)
    for what, calls in parts.items():
        seconds = alternating(dict(zip(names, calls)), repeats)
        total = {name: total[name] + seconds[name] for name in names}
        found.append(case(what, PROMPTS, full.shape[1], seconds, names[1], names[0]))
    return [*found, case("step", PROMPTS, full.shape[1], total, names[1], names[0])]


def case(what: str, rows: int, tokens: int, seconds: dict, slow: str, fast: str) -> dict:
    ratio = seconds[slow] / seconds[fast]
    made = {"what": what, "sequences": rows, "tokens": tokens, "seconds": seconds, "ratio": ratio}
    print(f"{what:9} {rows} x {tokens:3}: {slow} / {fast} = {ratio:.2f}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tinyllama-2", help="a shape and its layers")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--precision",
        default="medium",
        choices=("medium", "highest"),
        help="of float32 activations",
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for the results")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(args.precision)
    base = models.random_model(args.model)
    lk.replace_linear(base, r=0, progress=False)
    load = machine.load_average()
    roles = role_model(base, args.rank)
    cases = scoring(roles, ours_by_switching(roles), args.repeats)
    cases += training(roles, args.repeats)
    peer = peft_on_bitsandbytes(args.model, args.rank, base.config.hidden_size)
    if isinstance(peer, str):
        print(f"no step of bitsandbytes: {peer}")
    else:
        cases += steps(roles, peer, max(3, args.repeats // 3))
    document = {
        "model": args.model, "rank": args.rank, "precision": args.precision,
        "threads": torch.get_num_threads(), "load_before": load,
        "cpu": machine.cpu(), "versions": machine.versions(), "cases": cases,
    }  # fmt: skip
    if args.out:
        files.write_json(document, args.out)


if __name__ == "__main__":
    main()
