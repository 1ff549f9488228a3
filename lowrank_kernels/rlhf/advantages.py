"""From scores to advantages: token rewards, generalized advantage estimation, whitening, statistics of scores."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Reduce = Callable[[torch.Tensor], torch.Tensor]


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimates, ``A_t = Σ_l (gamma lam)^l δ_{t+l}``, ``δ_t = r_t + gamma V_{t+1} - V_t``.

    The sum goes over the tokens that ``mask`` keeps, in their order; the value after the last one is 0. What rewards
    and values hold elsewhere is ignored, NaN too.

    Args:
        rewards, values: ``[B, T]``, floating.
        mask: ``[B, T]``, true (or 1) for the tokens of the response.
        gamma, lam: from 0 to 1.

    Returns:
        ``(advantages, returns)``, ``[B, T]``, float32 (float64 if rewards or values are), not whitened, 0 where the
        mask is; ``returns = advantages + values``. Without gradients.

    Raises ValueError for other shapes, numbers or a mask that is neither boolean nor made of 0 and 1.
    Source: Schulman et al., arXiv 1506.02438.

    Examples:
        >>> import torch
        >>> from lowrank_kernels import rlhf
        >>> rewards, values = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.5, 9.0]])
        >>> mask = torch.tensor([[True, True, False]])
        >>> rlhf.gae(rewards, values, mask, gamma=1.0, lam=1.0)
        (tensor([[0.5000, 0.5000, 0.0000]]), tensor([[1., 1., 0.]]))
    """
    _two_dimensional("rewards", rewards)
    for name, tensor in (("values", values), ("mask", mask)):
        same_shape(name, tensor, "rewards", rewards)
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name}: expected a number from 0 to 1, got {number!r}")
    keep = kept(mask)
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    rewards, values = (t.detach().to(dtype).where(keep, 0) for t in (rewards, values))
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(len(rewards))
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        here = keep[:, t]
        next_value = torch.where(here, values[:, t], next_value)
        next_advantage = torch.where(here, advantage, next_advantage)
        advantages[:, t] = advantage.where(here, 0)
    return advantages, advantages + values


def token_rewards(
    scores: torch.Tensor, penalty: torch.Tensor, mask: torch.Tensor, coef: float
) -> torch.Tensor:
    """``R_t = -coef penalty_t + [t is the last token that the mask keeps] score``, ``[B, T]``; 0 elsewhere.

    ``scores [B]``, ``penalty [B, T]`` (see :func:`divergences.reward_penalty`), ``mask [B, T]``. Raises ValueError for
    other shapes and for a row without a token, whose score would be lost.

    Examples:
        >>> import torch
        >>> from lowrank_kernels import rlhf
        >>> mask = torch.tensor([[1, 1, 0]])
        >>> rlhf.token_rewards(torch.tensor([2.0]), torch.ones(1, 3), mask, coef=0.5)
        tensor([[-0.5000,  1.5000,  0.0000]])
    """
    _two_dimensional("penalty", penalty)
    same_shape("mask", mask, "penalty", penalty)
    if scores.shape != penalty.shape[:1]:
        raise ValueError(f"scores: expected [{len(penalty)}], got {list(scores.shape)}")
    keep = kept(mask)
    if not bool(keep.any(1).all()):
        raise ValueError(
            "mask: expected a token in every row, got one without any, whose score would be lost"
        )
    rewards = (-coef * penalty.detach()).where(keep, 0)
    last = last_kept(keep)
    rewards[torch.arange(len(last), device=last.device), last] += scores.to(rewards)
    return rewards


def whiten(
    x: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True, reduce: Reduce | None = None
) -> torch.Tensor:
    """``(x - mean) / sd`` over what ``mask`` keeps on all processes; 0 elsewhere.

    The variance is the unbiased one, n - 1 in its denominator, plus 1e-8.

    Args:
        x, mask: of one shape.
        shift_mean: False: only divided; the mean stays.
        reduce: sums a tensor over all processes; None: there is one.

    Raises ValueError for other shapes and for a mask that keeps nothing on any process.

    Examples:
        >>> import torch
        >>> from lowrank_kernels import rlhf
        >>> rlhf.whiten(torch.tensor([1.0, 3.0, 100.0]), torch.tensor([1, 1, 0]))
        tensor([-0.7071,  0.7071,  0.0000])
    """
    same_shape("mask", mask, "x", x)
    keep = kept(mask)
    reduce = reduce or (lambda tensor: tensor)
    x = x.float().where(keep, 0)
    count, total = reduce(torch.stack([keep.sum().double(), x.double().sum()]))
    if count == 0:
        raise ValueError("mask: expected it to keep an element, got one that keeps none")
    mean = total / count
    square = (x.double() - mean).square().where(keep, 0).sum()
    variance = reduce(square[None])[0] / (count - 1).clamp(min=1)
    scaled = (x - mean.float()) * (variance + 1e-8).rsqrt().float()
    return (scaled if shift_mean else scaled + mean.float()).where(keep, 0)


class ScoreStatistics:
    """Mean and standard deviation of all scores so far, by which scores are normalized.

    Over all processes where ``reduce`` sums over them. Sums are kept in float64.

    Examples:
        >>> import torch
        >>> from lowrank_kernels import rlhf
        >>> statistics = rlhf.ScoreStatistics()
        >>> statistics.update(torch.tensor([1.0, 3.0]))
        >>> statistics.normalize(torch.tensor([2.0, 3.0]))
        tensor([0., 1.])
    """

    def __init__(self) -> None:
        self.count, self.mean, self.square = 0.0, 0.0, 0.0

    def update(self, scores: torch.Tensor, reduce: Reduce | None = None) -> None:
        """Adds ``scores``, of any shape; raises ValueError for one that is not finite.

        Examples:
            >>> import torch
            >>> from lowrank_kernels import rlhf
            >>> statistics = rlhf.ScoreStatistics()
            >>> statistics.update(torch.tensor([1.0, 3.0]))
            >>> statistics.mean
            2.0
        """
        scores = scores.detach().double().flatten()
        reduce = reduce or (lambda tensor: tensor)
        finite = scores.isfinite().all()
        # A NaN on one process is an error on all: none is left waiting.
        count, total, bad = reduce(
            torch.stack(
                [scores.new_tensor(len(scores)), scores.nan_to_num().sum(), 1.0 - finite.double()]
            )
        ).tolist()
        if bad:
            raise ValueError("scores: expected finite numbers, got some that are not")
        if not count:
            return
        mean = total / count
        square = float(reduce((scores - mean).square().sum()[None])[0])
        delta, both = mean - self.mean, self.count + count
        self.mean += delta * count / both
        self.square += square + delta * delta * self.count * count / both
        self.count = both

    @property
    def sd(self) -> float:
        """The standard deviation; 1 until two different scores were seen."""
        return math.sqrt(self.square / self.count) if self.square > 0 else 1.0

    def normalize(self, scores: torch.Tensor) -> torch.Tensor:
        """``(scores - mean) / sd``.

        Examples:
            >>> import torch
            >>> from lowrank_kernels import rlhf
            >>> rlhf.ScoreStatistics().normalize(torch.tensor([2.0]))
            tensor([2.])
        """
        return (scores - self.mean) / self.sd

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs.

        Examples:
            >>> from lowrank_kernels import rlhf
            >>> rlhf.ScoreStatistics().state_dict()
            {'count': 0.0, 'mean': 0.0, 'square': 0.0}
        """
        return {"count": self.count, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes what :meth:`state_dict` gave.

        Examples:
            >>> from lowrank_kernels import rlhf
            >>> statistics = rlhf.ScoreStatistics()
            >>> statistics.load_state_dict({"count": 4.0, "mean": 1.0, "square": 16.0})
            >>> statistics.sd
            2.0
        """
        self.count, self.mean, self.square = (float(state[k]) for k in ("count", "mean", "square"))


# -- what losses.py needs too ----------------------------------------------------------------------


def kept(mask: torch.Tensor) -> torch.Tensor:
    """``mask`` as booleans; ValueError unless it is boolean or made of 0 and 1."""
    if mask.dtype == torch.bool:
        return mask
    keep = mask == 1
    if not bool((keep | (mask == 0)).all()):
        raise ValueError("mask: expected booleans, or 0 and 1, got other numbers")
    return keep


def last_kept(keep: torch.Tensor) -> torch.Tensor:
    """``[B]``: the index of the last true element of each row of ``keep [B, T]``."""
    return keep.shape[1] - 1 - keep.flip(1).int().argmax(1)


def same_shape(name: str, tensor: torch.Tensor, of: str, other: torch.Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name}: expected the shape of {of}, {list(other.shape)}, got {list(tensor.shape)}"
        )


def _two_dimensional(name: str, tensor: torch.Tensor) -> None:
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected [B, T], got {list(tensor.shape)}")
