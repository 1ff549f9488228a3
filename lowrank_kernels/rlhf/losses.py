"""The losses of PPO and of reward models; a mask says which tokens count."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .advantages import kept, same_shape

# A ratio of e^20 is a broken policy; its square and its gradient stay finite.
_LARGEST_LOG_RATIO = 20.0


class PolicyLoss(NamedTuple):
    """``loss`` has a gradient; the others are for the log: the share of tokens whose ratio the clip cut off, the mean
    ratio, and the mean of r - 1 - log r, which estimates KL(old, new)."""

    loss: torch.Tensor
    clip_fraction: torch.Tensor
    ratio: torch.Tensor
    approx_kl: torch.Tensor


class ValueLoss(NamedTuple):
    """``loss`` has a gradient; ``clip_fraction``: the share of tokens where the clipped square was the larger one."""

    loss: torch.Tensor
    clip_fraction: torch.Tensor


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    cliprange: float = 0.2,
    count: float | torch.Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped loss, ``mean of max(-A ρ, -A clip(ρ, 1 - c, 1 + c))``, ``ρ = exp(logprobs - old_logprobs)``.

    Args:
        logprobs: ``[B, T]``, of the policy that trains.
        old_logprobs: of the policy that sampled, from the same scoring pass: at first every ratio is 1.
        advantages: constants.
        mask: the tokens that count. What lies elsewhere is ignored, NaN too.
        cliprange: c, positive.
        count: what the sum is divided by; None: how many tokens the mask keeps. Of a part of a batch give the batch's.

    Returns:
        :class:`PolicyLoss`, of scalars.

    Raises ValueError for other shapes, a cliprange <= 0, or a mask that keeps no token while no count is given.
    Source: Schulman et al., arXiv 1707.06347.

    Examples:
        >>> import torch
        >>> from lowrank_kernels import rlhf
        >>> logprobs, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2)
        >>> rlhf.policy_loss(logprobs, logprobs, torch.tensor([[1.0, 2.0]]), mask).loss
        tensor(-1.5000)
    """
    others = {"old_logprobs": old_logprobs, "advantages": advantages, "mask": mask}
    keep = _checked("logprobs", logprobs, others)
    _positive("cliprange", cliprange)
    logprobs, old_logprobs, advantages = (
        t.float().where(keep, 0) for t in (logprobs, old_logprobs.detach(), advantages.detach())
    )
    log_ratio = (logprobs - old_logprobs).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    mean = _Mean(keep, count)
    with torch.no_grad():
        logs = (clipped > plain).float(), ratio, torch.expm1(log_ratio) - log_ratio
    return PolicyLoss(mean(torch.maximum(plain, clipped)), *map(mean, logs))


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    cliprange: float = 0.2,
    count: float | torch.Tensor | None = None,
) -> ValueLoss:
    """``mean of max((V - R)², (clip(V, V_old ± c) - R)²) / 2``: a value may not move far from what it was.

    Shapes ``[B, T]``; ``mask``, ``count`` and errors as of :func:`policy_loss`; ``old_values`` and ``returns`` are
    constants.

    Examples:
        >>> import torch
        >>> from lowrank_kernels import rlhf
        >>> old, mask = torch.zeros(1, 2), torch.ones(1, 2)
        >>> rlhf.value_loss(torch.tensor([[0.0, 1.0]]), old, torch.tensor([[1.0, 1.0]]), mask).loss
        tensor(0.4100)
    """
    others = {"old_values": old_values, "returns": returns, "mask": mask}
    keep = _checked("values", values, others)
    _positive("cliprange", cliprange)
    values, old_values, returns = (
        t.float().where(keep, 0) for t in (values, old_values.detach(), returns.detach())
    )
    near = old_values + (values - old_values).clamp(-cliprange, cliprange)
    plain, clipped = (values - returns).square(), (near - returns).square()
    mean = _Mean(keep, count)
    fraction = mean((clipped > plain).float())
    return ValueLoss(0.5 * mean(torch.maximum(plain, clipped)), fraction)


def ranking_loss(scores: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """``mean over pairs of -log σ(score of the better - score of the worse)`` of K answers to each of B prompts.

    All pairs of a prompt are one element: their mean, then the mean over the prompts that have a pair. At K = 2 this is
    the loss of a pair of a chosen and a rejected answer.

    Args:
        scores: ``[B, K]``, of a reward model; the loss is differentiable in them.
        ranks: ``[B, K]``, integers or finite numbers, the smallest is the best. Equal ranks make no pair.

    Returns:
        A scalar in the dtype of ``scores``, float32 at least.

    Raises ValueError for other shapes, a rank that is not finite, or no pair in the whole batch.
    Source: Ouyang et al., arXiv 2203.02155, equation 1.

    Examples:
        >>> import torch
        >>> from lowrank_kernels import rlhf
        >>> rlhf.ranking_loss(torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[1, 2, 3]]))
        tensor(0.2512)
    """
    if scores.dim() != 2:
        raise ValueError(f"scores: expected [B, K], got {list(scores.shape)}")
    same_shape("ranks", ranks, "scores", scores)
    if not bool(ranks.isfinite().all()):
        raise ValueError("ranks: expected finite numbers, got some that are not")
    better = ranks[:, :, None] < ranks[:, None, :]  # [B, K, K]: the first is better than the second
    pairs = better.sum((1, 2))
    if not bool((pairs > 0).any()):
        raise ValueError("ranks: expected a pair of different ranks in the batch, got none")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    losses = -F.logsigmoid(scores[:, :, None] - scores[:, None, :]).where(better, 0)
    return (losses.sum((1, 2)) / pairs.clamp(min=1)).sum() / (pairs > 0).sum()


class _Mean:
    """The sum over what is kept, divided by ``count`` or by how many tokens that are."""

    def __init__(self, keep: torch.Tensor, count: float | torch.Tensor | None):
        self.keep, self.count = keep, keep.sum() if count is None else count
        if count is None and not bool(keep.any()):
            raise ValueError("mask: expected it to keep a token, got one that keeps none")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.where(self.keep, 0).sum() / self.count


def _checked(of: str, first: torch.Tensor, others: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mask as booleans, once all have one shape."""
    for name, tensor in others.items():
        same_shape(name, tensor, of, first)
    return kept(others["mask"])


def _positive(name: str, number: float) -> None:
    if not number > 0:
        raise ValueError(f"{name}: expected a number > 0, got {number!r}")
