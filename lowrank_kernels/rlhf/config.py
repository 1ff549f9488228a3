"""``PPOConfig``: transformers' TrainingArguments and what PPO adds to them."""

from __future__ import annotations

import dataclasses
import math

import transformers

from . import divergences
from .rollout import Sampling


@dataclasses.dataclass
class PPOConfig(transformers.TrainingArguments):
    """The arguments of :class:`PPOTrainer`: those of transformers' ``TrainingArguments``, and these.

    A rollout has ``per_device_train_batch_size x gradient_accumulation_steps x num_mini_batches`` prompts on each
    process and is trained on ``num_ppo_epochs`` times, in as many optimizer steps each time as there are mini-batches.
    ``max_steps`` and the scheduler count optimizer steps.

    Args:
        max_prompt_length: prompts are cut to their last tokens; None: never.
        max_completion_length: tokens sampled at most.
        temperature: of sampling and of all log-probabilities.
        num_generations: completions of each prompt; it divides the prompts of a rollout.
        num_ppo_epochs, num_mini_batches: see above.
        score_batch_size: sequences of one scoring forward, which has each once for every role; None: four times
            ``per_device_train_batch_size``.
        divergence: of :data:`rlhf.divergences.NAMES`, by its reward form, from the reference.
        kl_coef: what it is multiplied by, β.
        adaptive_kl, kl_target, kl_horizon: whether and how :class:`AdaptiveKL` steers β; nats per sequence, episodes.
        gamma, lam: of :func:`gae`.
        cliprange, cliprange_value: of :func:`policy_loss` and :func:`value_loss`.
        vf_coef, entropy_coef: weights of the value's loss and of the entropy, which is added to the objective.
        whiten_advantages, whiten_rewards: over all processes; rewards by their standard deviation alone.
        missing_eos_penalty: subtracted from the score of a completion that does not end.
        normalize_scores: by mean and standard deviation of all scores so far.
        reward_weights: one for each of several reward functions; None: 1.
        ptx_coef: weight of the negative log-likelihood of ``ptx_dataset``, per token (PPO-ptx); 0: none.
        eos_token_id, pad_token_id: None: those of the tokenizer.
        top_p, top_k: refused but for 1 and 0, since then samples are not those of the log-probabilities.

    Raises ValueError naming the argument.

    Sources: Schulman et al., arXiv 1707.06347; Ouyang et al., arXiv 2203.02155.

    Examples:
        >>> from lowrank_kernels import rlhf
        >>> rlhf.PPOConfig("out", kl_coef=0.02, report_to="none").learning_rate
        0.0001
    """

    learning_rate: float = 1e-4
    adam_epsilon: float = 1e-5
    logging_steps: float = 1
    remove_unused_columns: bool = False
    # Every trained parameter is used in every step, and the buffers, statistics of the base, never change.
    ddp_find_unused_parameters: bool | None = False
    ddp_broadcast_buffers: bool | None = False

    max_prompt_length: int | None = None
    max_completion_length: int = 64
    temperature: float = 1.0
    num_generations: int = 1
    num_ppo_epochs: int = 1
    num_mini_batches: int = 1
    score_batch_size: int | None = None

    divergence: str = "kl"
    kl_coef: float = 0.05
    adaptive_kl: bool = False
    kl_target: float = 6.0
    kl_horizon: float = 10_000

    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    entropy_coef: float = 0.0
    whiten_advantages: bool = True
    whiten_rewards: bool = False

    missing_eos_penalty: float | None = None
    normalize_scores: bool = False
    reward_weights: list[float] | None = None
    ptx_coef: float = 0.0

    eos_token_id: int | None = None
    pad_token_id: int | None = None
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, expected, holds in self._rules():
            if not holds(getattr(self, name)):
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        if self.prompts_per_rollout % self.num_generations:
            raise ValueError(
                f"num_generations: expected a divisor of the sequences of a rollout, {self.prompts_per_rollout}, got "
                f"{self.num_generations}"
            )

    @staticmethod
    def _rules():
        def is_count(value: object) -> bool:
            return type(value) is int and value >= 1

        def is_number(value: object) -> bool:
            return isinstance(value, int | float) and math.isfinite(value)

        def is_weight(value: object) -> bool:
            return is_number(value) and value >= 0

        def is_positive(value: object) -> bool:
            return is_number(value) and value > 0

        def is_fraction(value: object) -> bool:
            return is_number(value) and 0 <= value <= 1

        counts = ("max_completion_length", "num_generations", "num_ppo_epochs", "num_mini_batches")
        yield from ((name, "an integer >= 1", is_count) for name in counts)
        for name in ("max_prompt_length", "score_batch_size"):
            yield name, "an integer >= 1 or None", lambda v: v is None or is_count(v)
        weights = ("kl_coef", "vf_coef", "entropy_coef", "ptx_coef")
        yield from ((name, "a number >= 0", is_weight) for name in weights)
        positive = ("temperature", "kl_target", "kl_horizon", "cliprange", "cliprange_value")
        yield from ((name, "a number > 0", is_positive) for name in positive)
        yield from ((name, "a number from 0 to 1", is_fraction) for name in ("gamma", "lam"))
        yield "missing_eos_penalty", "a number >= 0 or None", lambda v: v is None or is_weight(v)
        yield (
            "divergence",
            f"one of {', '.join(divergences.NAMES)}",
            lambda v: v in divergences.NAMES,
        )
        whole = "since log-probabilities are those of the whole distribution"
        yield "top_p", f"1, {whole}", lambda v: v == 1
        yield "top_k", f"0, {whole}", lambda v: v in (0, None)

    @property
    def prompts_per_rollout(self) -> int:
        """Sequences of a rollout on each process."""
        return (
            self.per_device_train_batch_size
            * self.gradient_accumulation_steps
            * self.num_mini_batches
        )


def check_arguments(args: PPOConfig) -> None:
    """Raises ValueError for what a Trainer offers and PPO cannot use."""
    if args.n_gpu > 1:
        raise ValueError(
            f"args: expected one GPU for each process, got {args.n_gpu}: start a process for each (torchrun, "
            "accelerate launch), or set CUDA_VISIBLE_DEVICES"
        )
    for name, expected in (("auto_find_batch_size", False), ("label_smoothing_factor", 0)):
        if getattr(args, name) != expected:
            raise ValueError(f"{name}: expected {expected}, got {getattr(args, name)!r}")
    if args.eval_strategy != "no":
        raise ValueError(f"eval_strategy: expected 'no', got {args.eval_strategy!r}")


def sampling_of(args: PPOConfig, tokenizer: object) -> Sampling:
    """Raises ValueError where end and padding cannot be told apart."""
    eos = (
        getattr(tokenizer, "eos_token_id", None) if args.eos_token_id is None else args.eos_token_id
    )
    pad = (
        getattr(tokenizer, "pad_token_id", None) if args.pad_token_id is None else args.pad_token_id
    )
    if eos is None:
        raise ValueError("processing_class: expected a tokenizer with an end token, got none")
    if pad is None or pad == eos:
        raise ValueError(
            f"processing_class: expected a padding token that is not the end token {eos}, got {pad}; otherwise a model "
            "does not learn to end: set tokenizer.pad_token to another one"
        )
    return Sampling(args.max_completion_length, args.temperature, eos, pad)
