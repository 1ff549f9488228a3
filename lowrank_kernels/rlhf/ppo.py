"""``PPOTrainer``: proximal policy optimization as a ``transformers.Trainer``.

The data loader gives a batch of prompts for every micro-batch, and the same one as long as a rollout lasts. At the
first of them the policy writes completions, one forward scores them for all roles, and advantages are estimated; then
micro-batches of the rollout are handed out. All else, from accumulation to checkpoints, is the Trainer's.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers.trainer import TRAINING_ARGS_NAME

from .. import files
from ..ragged import padded
from . import divergences
from .advantages import ScoreStatistics, gae, token_rewards, whiten
from .config import PPOConfig, check_arguments, sampling_of
from .control import AdaptiveKL, FixedKL
from .data import Rewards, RolloutBatches, encode_texts, read_prompts
from .losses import policy_loss, value_loss
from .roles import RoleModel
from .rollout import Rollout, Sampler, TransformersSampler, check_rollout

RewardFunction = Callable[..., Sequence[float | None]]
_STATE, _ROLLOUT = "ppo_state_{}.json", "ppo_rollout_{}.safetensors"
_OF_ROLLOUT = {"ids", "mask", "where", "logprobs", "values", "advantages", "returns"}
_LARGEST_WEIGHT = 2.0  # of a token whose sampler gave it another probability than the policy


class PPOTrainer(transformers.Trainer):
    """Trains policy and value of a :class:`RoleModel` by PPO against its reward adapter, or reward functions.

    A token's reward is ``-kl_coef · penalty``, the reward form of the divergence from the reference, and the last one's
    has the score of the completion besides. Advantages are :func:`gae`'s, whitened over all processes; the losses are
    :func:`policy_loss` and ``vf_coef`` times :func:`value_loss`, means over the tokens of an optimizer step.

    Everything that a Trainer does stays: callbacks, logging, ``gradient_accumulation_steps``, DistributedDataParallel,
    checkpoints. A resumed run equals an uninterrupted one bit for bit. A checkpoint holds adapters, the value's head,
    optimizer, random states, statistics, β and a rollout that is not used up, and not the base.

    Args:
        roles: the :class:`RoleModel`; its temperature becomes that of the config.
        args: a :class:`PPOConfig`.
        train_dataset: prompts: a dataset of the column ``prompt``, text or messages, a list of such rows, or a list of
            texts. Other columns go to the reward functions.
        processing_class: the tokenizer, whose padding token is not its end token.
        reward_funcs: one or more functions ``f(prompts, completions, completion_ids, **columns)``, as TRL's, that
            return a number, or None for no opinion, for each completion; their weighted sum is the score. None: the
            reward adapter.
        sampler: a :class:`rlhf.Sampler`; None: :class:`rlhf.TransformersSampler`. Where it returns log-probabilities μ
            of its own, a token's advantage counts min(π / μ, 2) times.
        ptx_dataset: texts (a column ``text``, or a list) that ``ptx_coef`` weighs.
        callbacks, optimizers, optimizer_cls_and_kwargs: as of Trainer.

    Raises TypeError, ValueError naming the argument.

    Sources: Ouyang et al., arXiv 2203.02155; Schulman et al., arXiv 1707.06347.

    Examples:
        >>> import torch, transformers, lowrank_kernels as lk
        >>> from lowrank_kernels import rlhf
        >>> sizes = dict(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
        >>> heads = dict(num_attention_heads=2, num_key_value_heads=2)
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
        >>> report = lk.replace_linear(model, r=0, progress=False)
        >>> roles = rlhf.RoleModel(model, r=8)
        >>> def evens(completion_ids, **_):
        ...     return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
        >>> config = rlhf.PPOConfig(
        ...     "out", max_steps=1, max_completion_length=4, per_device_train_batch_size=2, use_cpu=True,
        ...     report_to="none", disable_tqdm=True, eos_token_id=2, pad_token_id=0,
        ... )
        >>> prompts = [{"prompt_ids": [5, 6, 7]}, {"prompt_ids": [8, 9]}]
        >>> trainer = rlhf.PPOTrainer(roles, config, train_dataset=prompts, reward_funcs=evens)
        >>> trainer.remove_callback(transformers.PrinterCallback)
        >>> trainer.train().global_step
        1
    """

    def __init__(
        self,
        roles: RoleModel,
        args: PPOConfig,
        train_dataset=None,
        processing_class=None,
        reward_funcs: RewardFunction | list[RewardFunction] | None = None,
        sampler: Sampler | None = None,
        ptx_dataset=None,
        callbacks: list[transformers.TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        optimizer_cls_and_kwargs: tuple | None = None,
    ) -> None:
        if not isinstance(roles, RoleModel):
            raise TypeError(f"roles: expected a RoleModel, got {type(roles).__name__}")
        if not isinstance(args, PPOConfig):
            raise TypeError(f"args: expected a PPOConfig, got {type(args).__name__}")
        check_arguments(args)
        vocabulary = roles.model.get_input_embeddings().weight.shape[0]
        self.prompts = read_prompts(
            train_dataset, processing_class, args.max_prompt_length, vocabulary
        )
        self.sampling = sampling_of(args, processing_class)
        self.rewards = Rewards(reward_funcs, args.reward_weights, processing_class)
        if not self.rewards.functions and roles.has_reward is False:
            raise ValueError(
                "reward_funcs: expected functions, since the RoleModel was made without a reward adapter, got None"
            )
        self.texts = encode_texts(ptx_dataset, processing_class, args)
        super().__init__(
            model=roles,
            args=args,
            train_dataset=self.prompts,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "args: expected no FSDP and no DeepSpeed, which PPOTrainer does not support"
            )
        episodes = args.prompts_per_rollout * self.accelerator.num_processes
        if args.adaptive_kl and episodes > args.kl_horizon:
            raise ValueError(
                f"kl_horizon: expected at least the episodes of a rollout, {episodes}, got {args.kl_horizon}"
            )
        self.model_accepts_loss_kwargs = False  # Trainer divides by the accumulation steps
        self.roles, roles.temperature = roles, args.temperature
        self.sampler = TransformersSampler(roles) if sampler is None else sampler
        self.control_of_kl = (
            AdaptiveKL(args.kl_coef, args.kl_target, args.kl_horizon)
            if args.adaptive_kl
            else FixedKL(args.kl_coef)
        )
        self.statistics = ScoreStatistics()
        self._rollout: dict[str, torch.Tensor] = {}
        self._micro, self._count = 0, 0.0  # micro-batches handed out, tokens of this optimizer step
        self._logs: dict[str, list[float]] = defaultdict(list)

    # -- the three overrides -----------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Batches of prompts: each process gets its part of a rollout once for every micro-batch of it."""
        size = self.args.prompts_per_rollout // self.args.num_generations
        repeats = self.args.num_ppo_epochs * self._micro_batches
        processes = self.accelerator.num_processes
        batches = RolloutBatches(len(self.prompts), size, processes, repeats, self.args.seed)
        loader = DataLoader(
            self.prompts, batch_sampler=batches, collate_fn=lambda rows: {"rows": list(rows)}
        )
        return self.accelerator.prepare(loader)

    def _prepare_inputs(self, inputs: dict) -> dict[str, torch.Tensor]:
        """The next micro-batch of the rollout, which is made of these prompts if the last one is used up."""
        per_epoch = self._micro_batches
        epoch, micro = divmod(self._micro % (self.args.num_ppo_epochs * per_epoch), per_epoch)
        if (epoch, micro) == (0, 0):
            self._rollout = self._make_rollout(inputs["rows"])
        if micro == 0:
            self._order = self._shuffled()
        rows = self._order.split(self.args.per_device_train_batch_size)
        batch = {name: tensor[rows[micro]] for name, tensor in self._rollout.items()}
        # Means are over the tokens of an optimizer step.
        steps = self.args.gradient_accumulation_steps
        if micro % steps == 0:
            of_step = self._rollout["where"][torch.cat(rows[micro : micro + steps])].sum()
            self._count = float(self._sum(of_step.float()[None])[0])
        batch["count"] = torch.tensor(self._count / (steps * self.accelerator.num_processes))
        if self.texts:
            batch["texts"] = torch.tensor(self._micro * self.accelerator.num_processes)
        self._micro += 1
        return batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """PPO's loss of one micro-batch; ``model`` may be the RoleModel in DistributedDataParallel."""
        args, where, count = self.args, inputs["where"], inputs["count"]
        texts = self._next_texts(int(inputs["texts"])) if "texts" in inputs else None
        out = model(
            inputs["ids"], inputs["mask"], where=where, entropy=args.entropy_coef > 0, texts=texts
        )
        policy = policy_loss(
            out["policy"], inputs["logprobs"], inputs["advantages"], where, args.cliprange, count
        )
        value = value_loss(
            out["value"][:, :-1], inputs["values"], inputs["returns"], where, args.cliprange_value, count
        )  # fmt: skip
        loss = policy.loss + args.vf_coef * value.loss
        if args.entropy_coef:
            loss = loss - args.entropy_coef * out["entropy"].where(where, 0).sum() / count
        if texts is not None:
            kept = texts[1][:, 1:] & texts[1][:, :-1]
            nll = -out["texts"].sum() / kept.sum()
            loss = loss + args.ptx_coef * nll
            self._logs["ptx_nll"].append(float(nll.detach()))
        share = where.sum() / count  # the means above are shares of those of the step
        for name, number in (
            ("policy_loss", policy.loss), ("value_loss", value.loss), ("ratio", policy.ratio),
            ("clip_fraction", policy.clip_fraction), ("clip_fraction_value", value.clip_fraction),
            ("approx_kl", policy.approx_kl),
        ):  # fmt: skip
            self._logs[name].append(float((number / share.clamp(min=1e-9)).detach()))
        return (loss, out) if return_outputs else loss

    # -- a rollout ---------------------------------------------------------------------------------

    @property
    def _micro_batches(self) -> int:
        """Of one pass over a rollout."""
        return self.args.gradient_accumulation_steps * self.args.num_mini_batches

    @property
    def _shape(self) -> dict[str, int]:
        """What a rollout that is not used up fits to."""
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches",
                 "num_ppo_epochs", "num_generations")  # fmt: skip
        of_args = {name: getattr(self.args, name) for name in names}
        return {"processes": self.accelerator.num_processes, **of_args}

    def _shuffled(self) -> torch.Tensor:
        """The order of the sequences in one pass over the rollout; a resumed run finds the same one."""
        passes = self._micro // self._micro_batches
        generator = torch.Generator().manual_seed(self.args.seed + passes)
        return torch.randperm(len(self._rollout["ids"]), generator=generator)

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Over all processes."""
        return self.accelerator.reduce(tensor.to(self.accelerator.device), "sum").to(tensor)

    @torch.no_grad()
    def _make_rollout(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Samples, scores, and estimates advantages: what the losses need of every sequence of this process."""
        args = self.args
        self.sampler.sync(self.roles, self.state.global_step)
        prompts = [row["prompt_ids"] for row in rows]
        sampling = self.sampling._replace(seeds=self._seeds())
        with self.accelerator.autocast():
            rollout = self.sampler.generate(prompts, args.num_generations, sampling)
        rows = [row for row in rows for _ in range(args.num_generations)]
        rollout, where = check_rollout(rollout, len(rows)), rollout.of_completion
        scored = self._score(rollout, where)
        scores = self._scores(rollout, rows, scored)
        values = scored["value"][:, :-1]
        penalty = divergences.reward_penalty(args.divergence, scored["policy"], scored["reference"])
        rewards = token_rewards(scores, penalty, where, self.control_of_kl.value)
        if args.whiten_rewards:
            rewards = whiten(rewards, where, shift_mean=False, reduce=self._sum)
        advantages, returns = gae(rewards, values, where, args.gamma, args.lam)
        self._log_rollout(rollout, where, scored, values, returns)
        if args.whiten_advantages:
            advantages = whiten(advantages, where, reduce=self._sum)
        if rollout.logprobs is not None:
            weight = (scored["policy"] - rollout.logprobs).exp().clamp(max=_LARGEST_WEIGHT)
            advantages = advantages * weight.where(where, 0)
        kl = scored["divergence"].where(where, 0).sum()
        kl, episodes = self._sum(torch.stack([kl, kl.new_tensor(len(rows))])).tolist()
        self.control_of_kl.update(kl / episodes, int(episodes))
        return {
            "ids": rollout.ids, "mask": rollout.mask, "where": where, "logprobs": scored["policy"],
            "values": values.where(where, 0), "advantages": advantages, "returns": returns,
        }  # fmt: skip

    def _seeds(self) -> tuple[int, ...]:
        """Of each completion of this process's part of the rollout, whatever the number of processes."""
        count, processes = self.args.prompts_per_rollout, self.accelerator.num_processes
        rollouts = self._micro // (self.args.num_ppo_epochs * self._micro_batches)
        first = (rollouts * processes + self.accelerator.process_index) * count
        return tuple((self.args.seed << 32) + first + i for i in range(count))

    def _score(self, rollout: Rollout, where: torch.Tensor) -> dict[str, torch.Tensor]:
        """What all roles say, some sequences at a time."""
        roles = ["policy", "reference", "value"] + ["reward"] * (not self.rewards.functions)
        size = self.args.score_batch_size or 4 * self.args.per_device_train_batch_size
        training = self.roles.training
        self.roles.eval()
        parts = [
            self.roles(ids, mask, roles, where=part, entropy=True, divergence="kl")
            for ids, mask, part in zip(rollout.ids.split(size), rollout.mask.split(size), where.split(size))
        ]  # fmt: skip
        self.roles.train(training)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _scores(
        self, rollout: Rollout, rows: list[dict], scored: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """``[B]``: by the reward adapter or the functions, then normalized, then less for a missing end."""
        completions = [
            ids[keep].tolist()
            for ids, keep in zip(rollout.ids[:, 1:], rollout.of_completion, strict=True)
        ]
        if self.rewards.functions:
            scores, by_function = self.rewards(rows, completions)
            for name, numbers in by_function.items():
                self._logs[f"rewards/{name}"].append(numbers)
        else:
            scores = scored["reward"].float().cpu()
        ends = torch.tensor([ids[-1] == self.sampling.eos_token_id for ids in completions])
        self._logs["score"].append(float(scores.mean()))
        self._logs["score_sd"].append(float(scores.std(unbiased=False)))
        self._logs["ends"].append(float(ends.float().mean()))
        self._logs["completion_length"].append(sum(map(len, completions)) / len(completions))
        if self.args.normalize_scores:
            self.statistics.update(scores, self._sum)
            scores = self.statistics.normalize(scores)
        if self.args.missing_eos_penalty:
            scores = scores - self.args.missing_eos_penalty * (~ends).float()
        return scores.to(rollout.ids.device)

    def _log_rollout(
        self,
        rollout: Rollout,
        where: torch.Tensor,
        scored: dict[str, torch.Tensor],
        values: torch.Tensor,
        returns: torch.Tensor,
    ) -> None:
        logs, tokens = self._logs, where.sum()

        def mean(x: torch.Tensor) -> float:
            return float(x.where(where, 0).sum() / tokens)

        policy, reference = scored["policy"], scored["reference"]
        logs["kl"].append(float((policy - reference).where(where, 0).sum() / len(where)))
        logs["kl_exact"].append(mean(scored["divergence"]))
        logs["divergence"].append(mean(divergences.value(self.args.divergence, policy, reference)))
        logs["entropy"].append(mean(scored["entropy"]))
        logs["kl_coef"].append(self.control_of_kl.value)
        kept = returns[where]
        spread = kept.var(unbiased=False)
        error = (kept - values[where]).var(unbiased=False)
        logs["explained_variance"].append(float(1 - error / spread) if spread > 0 else 0.0)
        if rollout.logprobs is not None:
            logs["sampler_difference"].append(mean((rollout.logprobs - policy).abs()))

    def _next_texts(self, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As many texts as a micro-batch has sequences, each process its own, in turn."""
        size = self.args.per_device_train_batch_size
        start = (first + self.accelerator.process_index) * size
        chosen = [self.texts[(start + i) % len(self.texts)] for i in range(size)]
        ids, mask = padded(chosen)
        device = self.accelerator.device
        return ids.to(device), mask.to(device)

    # -- logs and files ----------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means, over all processes, of what was seen since the last log."""
        if "loss" in logs and self._logs:
            means = [sum(seen) / len(seen) for seen in self._logs.values()]
            total = self._sum(torch.tensor(means)) / self.accelerator.num_processes
            logs.update(zip(self._logs, total.tolist()))
            self._logs.clear()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The folders ``policy`` and ``value`` of PEFT's format, the tokenizer and the arguments."""
        if not self.args.should_save:  # another process does
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.roles.save(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.save_only_model:
            return
        name = f"{transformers.trainer_utils.PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder, rank = Path(self._get_output_dir(trial)) / name, self.accelerator.process_index
        state = {
            "micro": self._micro,
            "count": self._count,
            "shape": self._shape,
            "statistics": self.statistics.state_dict(),
        }
        if self.args.adaptive_kl:
            state["control"] = self.control_of_kl.state_dict()
        with files.written(folder / _STATE.format(rank)) as file:
            file.write(json.dumps(state).encode())
        if self._micro % (self.args.num_ppo_epochs * self._micro_batches):
            target = folder / _ROLLOUT.format(rank)
            tensors = {name: t.contiguous() for name, t in self._rollout.items()}
            save_file(tensors | {"order": self._order}, f"{target}.new")
            os.replace(f"{target}.new", target)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder, rank = Path(resume_from_checkpoint), self.accelerator.process_index
        self.roles.load(folder)
        file = folder / _STATE.format(rank)
        if not file.is_file():
            raise FileNotFoundError(
                f"resume_from_checkpoint: expected {file.name} of process {rank} in {folder}; was it saved by as many "
                "processes?"
            )
        state = json.loads(file.read_text())
        if state["shape"] != self._shape:
            raise ValueError(
                f"resume_from_checkpoint: expected the processes and batches of {file}, {state['shape']}, got "
                f"{self._shape}"
            )
        self._micro, self._count = int(state["micro"]), float(state["count"])
        self.statistics.load_state_dict(state["statistics"])
        if self.args.adaptive_kl and "control" in state:
            self.control_of_kl.load_state_dict(state["control"])
        if self._micro % (self.args.num_ppo_epochs * self._micro_batches):
            self._load_rollout(folder / _ROLLOUT.format(rank))

    def _load_rollout(self, file: Path) -> None:
        tensors = {n: t.to(self.accelerator.device) for n, t in load_file(file).items()}
        order = tensors.pop("order", torch.empty(0)).cpu()
        count = self.args.prompts_per_rollout
        columns = {
            len(t.T) - (name in ("ids", "mask")) for name, t in tensors.items() if t.dim() == 2
        }
        rows = {len(t) if t.dim() == 2 else 0 for t in tensors.values()}
        if tensors.keys() != _OF_ROLLOUT or rows != {count} or len(columns) != 1:
            found = {name: tuple(t.shape) for name, t in tensors.items()}
            raise ValueError(
                f"{file}: expected {count} rows of {sorted(_OF_ROLLOUT)} of one length, got {found}"
            )
        if sorted(order.tolist()) != list(range(count)):
            raise ValueError(f"{file}: expected an order of {count} rows, got {order.tolist()}")
        self._rollout, self._order = tensors, order
