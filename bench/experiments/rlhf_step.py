"""What one base for four roles saves in PPO: ``python -m bench.experiments.rlhf_step``.

Ratios within one run, each a median of alternating calls:

- scoring: one mixed forward of four roles against four forwards with ``set_adapter``, on the same layers;
- training: one backward of policy and value against two;
- a PPO step (sample, score, train): this library against the same steps written with PEFT and bitsandbytes, whose
  adapters are switched by ``set_adapter``, on the same bytes, prompts and number of tokens.

All models have random weights. Rows are tokens of one role.
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

    def role(self, role: str, ids: torch.Tensor) -> torch.Tensor:
        self.switch(role)
        if role in ("policy", "reference"):
            logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        causal = getattr(self.model, "base_model", self.model)
        body = getattr(causal, "model", causal)
        hidden = getattr(body, "model", body)(input_ids=ids, use_cache=False).last_hidden_state
        value = self.head(hidden.float())[..., 0]
        return value if role == "value" else value[:, -1]

    def score(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {role: self.role(role, ids) for role in ROLES}

    def train(self, ids: torch.Tensor) -> None:
        for role in ("policy", "value"):
            self.role(role, ids).float().square().mean().backward()

    def generate(self, prompts: torch.Tensor) -> torch.Tensor:
        self.switch("policy")
        return sampled(self.model, prompts)


def sampled(model: torch.nn.Module, prompts: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=COMPLETION,
            min_new_tokens=COMPLETION, do_sample=True, top_k=0, top_p=1.0, pad_token_id=0, use_cache=True,
        )  # fmt: skip


def ours_by_switching(roles: rlhf.RoleModel) -> Separate:
    """On the layers of a RoleModel; reference and reward are given the adapters of policy and value."""
    of = {"reference": "policy", "reward": "value"}
    switch = lambda role: lk.set_adapter(roles.model, of.get(role, role))  # noqa: E731
    return Separate(roles.model, switch, roles.value_head)


def peft_on_bitsandbytes(name: str, rank: int, width: int) -> Separate | str:
    """Four PEFT adapters on bitsandbytes' layers; why not, where there is none."""
    made = models.contenders(models.random_model(name), rank, [models.BITSANDBYTES])
    model = made[models.BITSANDBYTES]
    if isinstance(model, str):
        return model
    for role in ROLES:
        model.add_adapter(role, model.peft_config["default"])
    randomize(model)
    return Separate(model, model.set_adapter, torch.nn.Linear(width, 1, bias=False))


def scoring(roles: rlhf.RoleModel, one_by_one: Separate, repeats: int) -> list[dict]:
    found = []
    for rows, tokens in SCORED:
        ids = models.random_batch(models.VOCABULARY, "cpu", rows, tokens)["input_ids"]
        mask = torch.ones_like(ids)
        calls = {
            "mixed": lambda ids=ids, mask=mask: roles.score(ids, mask, ROLES),
            "set_adapter": lambda ids=ids: one_by_one.score(ids),
        }
        seconds = alternating(calls, repeats)
        lk.set_adapter(roles.model, "policy")
        found.append(case("scoring", rows, tokens, seconds, "set_adapter", "mixed"))
    return found


def training(roles: rlhf.RoleModel, repeats: int) -> list[dict]:
    def backward(ids: torch.Tensor, *wanted: list[str]) -> None:
        roles.zero_grad()
        for some in wanted:
            losses(roles(ids, torch.ones_like(ids), some)).backward()

    found = []
    roles.bank.trainable("policy", "value")
    for rows, tokens in TRAINED:
        ids = models.random_batch(models.VOCABULARY, "cpu", rows, tokens)["input_ids"]
        calls = {
            "joint": lambda ids=ids: backward(ids, ["policy", "value"]),
            "separate": lambda ids=ids: backward(ids, ["policy"], ["value"]),
        }
        found.append(
            case("training", rows, tokens, alternating(calls, repeats), "separate", "joint")
        )
    return found


def steps(roles: rlhf.RoleModel, peer: Separate, repeats: int) -> dict:
    prompts = models.random_batch(models.VOCABULARY, "cpu", PROMPTS, PROMPT)["input_ids"]

    def ours() -> None:
        roles.eval()
        ids = sampled(roles.model, prompts)
        mask = torch.ones_like(ids)
        roles.score(ids, mask, ROLES)
        roles.train().zero_grad()
        losses(roles(ids, mask)).backward()

    def theirs() -> None:
        peer.model.eval()
        ids = peer.generate(prompts)
        peer.score(ids)
        peer.model.train().zero_grad()
        peer.train(ids)

    seconds = alternating({"lowrank_kernels": ours, "peft + bitsandbytes": theirs}, repeats)
    tokens = PROMPT + COMPLETION
    return case("step", PROMPTS, tokens, seconds, "peft + bitsandbytes", "lowrank_kernels")


def case(what: str, rows: int, tokens: int, seconds: dict, slow: str, fast: str) -> dict:
    ratio = seconds[slow] / seconds[fast]
    made = {"what": what, "sequences": rows, "tokens": tokens, "seconds": seconds, "ratio": ratio}
    print(f"{what:9} {rows} x {tokens:3}: {slow} / {fast} = {ratio:.2f}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tinyllama-2", help="a shape and its layers")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for the results")
    args = parser.parse_args()
    torch.manual_seed(0)
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
        cases.append(steps(roles, peer, max(3, args.repeats // 3)))
    document = {
        "model": args.model, "rank": args.rank, "threads": torch.get_num_threads(), "load_before": load,
        "cpu": machine.cpu(), "versions": machine.versions(), "cases": cases,
    }  # fmt: skip
    if args.out:
        files.write_json(document, args.out)


if __name__ == "__main__":
    main()
