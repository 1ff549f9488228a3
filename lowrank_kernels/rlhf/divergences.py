"""Divergences of a policy p from a reference q: what to log, and what to penalise.

With r = q / p and a convex f, f(1) = 0, a divergence is D_f = E_p f(r). Of a sampled token there are two forms:

- the *value* f(r) - f'(1) (r - 1): its expectation under p is D_f, and it is never negative. Log it.
- the *reward form* f(r) - r f'(r): since ∇ E_p f(r) = E_p[∇ log p · (f(r) - r f'(r))], a policy gradient with it as
  penalty is the gradient of D_f. Up to a constant, which changes no gradient, and it may be negative. Penalise with it.

====================  ==============================  =======================  =================================
name                  D_f                             f(r)                     reward form
====================  ==============================  =======================  =================================
``kl``                KL(p, q)                        -log r                   log(p / q)
``forward_kl``        KL(q, p)                        r log r                  -r
``js``                Jensen-Shannon                  [r log r                 log(p / m) / 2, m = (p + q) / 2
                                                      - (1+r) log((1+r)/2)]/2
``tv``                total variation                 abs(r - 1) / 2           sign(log p - log q) / 2
``chi2``              E_p (r - 1)²                    (r - 1)²                 1 - r²
``none``              0                               0                        0
====================  ==============================  =======================  =================================

Four more are the penalties of *Exploring the impact of low-rank adaptation on the performance, efficiency, and
regularization of RLHF* (arXiv 2309.09055), as its code has them, with d = log p - log q. Value and reward form are the
penalty itself; the policy gradient with it is not that of the divergence it is named after:

====================  ======================================  ===================================================
name                  penalty                                 what it is
====================  ======================================  ===================================================
``bregman``           r - 1 - log r                           the value of ``kl``; as a reward its gradient is that of
                                                              KL(p, q) - KL(q, p), which vanishes near the reference
``squared``           d² / 2                                  KL to second order where p is near q
``clamped_kl``        max(d, 0)                               ``kl`` without its negative part: biased upwards
``js_sun2023``        max(log(p/m), 0)/2 + max(log(q/m), 0)/2  no Jensen-Shannon divergence: at most log(2) / 2, with a
                                                              slope of 1/4 on both sides of 0
====================  ======================================  ===================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

_LN2 = math.log(2)
# A sampled token whose reference probability is e^40 times its own does not occur. The limit keeps r² in float32.
_LARGEST_LOG_RATIO = 40.0


class _Divergence(NamedTuple):
    """``value`` and ``reward`` of d = log p - log q; ``exact``: the terms of the sum, of p, q, log p and log q."""

    value: Callable
    reward: Callable
    exact: Callable


def _ratio(d: torch.Tensor) -> torch.Tensor:
    return torch.exp(-d.clamp(min=-_LARGEST_LOG_RATIO))


def _k3(d: torch.Tensor) -> torch.Tensor:
    """r - 1 - log r, in which nothing cancels where r is near 1."""
    return torch.expm1(-d.clamp(min=-_LARGEST_LOG_RATIO)) + d


def _r_log_r(d: torch.Tensor) -> torch.Tensor:
    """r log r, which is 0 at r = 0."""
    finite = d.clamp(-_LARGEST_LOG_RATIO, 1e3)
    return -finite * torch.exp(-finite)


def _js_value(d: torch.Tensor) -> torch.Tensor:
    d = d.clamp(min=-_LARGEST_LOG_RATIO)
    # log(p / m) / 2 and r log(q / m) / 2.
    return 0.5 * (_js_reward_of(d) + torch.exp(-d) * _js_reward_of(-d)).clamp(min=0)


def _js_reward_of(d: torch.Tensor) -> torch.Tensor:
    """log(p / m); near d = 0 in a form in which nothing cancels."""
    near = -torch.log1p(0.5 * torch.expm1(-d.clamp(-1, 1)))
    return torch.where(d.abs() < 1, near, _LN2 - F.softplus(-d))


def _times(weight: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
    """``weight * term``, and 0 where the weight is 0 whatever the term is, in gradients too."""
    there = weight > 0
    return torch.where(there, weight * torch.where(there, term, 0.0), 0.0)


def _of_penalty(penalty: Callable) -> _Divergence:
    return _Divergence(penalty, penalty, lambda p, q, logp, logq: _times(p, penalty(logp - logq)))


_TABLE = {
    "kl": _Divergence(
        value=_k3,
        reward=lambda d: d,
        exact=lambda p, q, logp, logq: _times(p, logp - logq),
    ),
    "js": _Divergence(
        value=_js_value,
        reward=lambda d: 0.5 * _js_reward_of(d),
        exact=lambda p, q, logp, logq: (
            0.5 * (_times(p, _js_reward_of(logp - logq)) + _times(q, _js_reward_of(logq - logp)))
        ),
    ),
    "forward_kl": _Divergence(
        value=lambda d: _r_log_r(d) - torch.expm1(-d.clamp(min=-_LARGEST_LOG_RATIO)),
        reward=lambda d: -_ratio(d),
        exact=lambda p, q, logp, logq: _times(q, logq - logp),
    ),
    "tv": _Divergence(
        value=lambda d: 0.5 * torch.expm1(-d.clamp(min=-_LARGEST_LOG_RATIO)).abs(),
        reward=lambda d: 0.5 * d.sign(),
        exact=lambda p, q, logp, logq: 0.5 * (p - q).abs(),
    ),
    "chi2": _Divergence(
        value=lambda d: torch.expm1(-d.clamp(min=-_LARGEST_LOG_RATIO)).square(),
        reward=lambda d: 1 - _ratio(d).square(),
        exact=lambda p, q, logp, logq: _times(q, torch.expm1(logq - logp)) - (q - p),
    ),
    "none": _Divergence(
        value=torch.zeros_like,
        reward=torch.zeros_like,
        exact=lambda p, q, logp, logq: torch.zeros_like(p),
    ),
    "bregman": _Divergence(
        value=_k3,
        reward=_k3,
        exact=lambda p, q, logp, logq: _times(p, logp - logq),
    ),
    "squared": _of_penalty(lambda d: 0.5 * d.square()),
    "clamped_kl": _of_penalty(lambda d: d.clamp(min=0)),
    "js_sun2023": _of_penalty(lambda d: 0.5 * _js_reward_of(d.abs())),
}
NAMES = tuple(_TABLE)


def value(name: str, logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """``f(r) - f'(1) (r - 1)`` of each token, r = exp(logq - logp): never negative, its mean under p is the divergence.

    Args:
        name: one of ``NAMES``, which the module describes.
        logp: log-probabilities of tokens sampled from p, any shape, any floating dtype.
        logq: those of the same tokens under the reference q, of the same shape.

    Returns:
        Of the shape of ``logp``, float32 (float64 if an argument is). Ratios above e^40 count as e^40.

    Raises ValueError for another name or other shapes, TypeError for what is no floating tensor.

    Examples:
        >>> import torch
        >>> from lowrank_kernels import rlhf
        >>> logp, logq = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> print(round((logp.exp() * rlhf.divergences.value("kl", logp, logq)).sum().item(), 4))
        0.1438
    """
    return _of(name).value(_log_ratio(logp, logq))


def reward_penalty(name: str, logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """``f(r) - r f'(r)`` of each token, up to a constant: what to subtract from its reward, times a coefficient.

    The policy gradient of this penalty is that of the divergence; of the four penalties of the paper it is not.
    Arguments, result and errors as of :func:`value`; no gradient belongs through a reward.

    Examples:
        >>> import torch
        >>> from lowrank_kernels import rlhf
        >>> logp, logq = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.5])
        >>> rlhf.divergences.reward_penalty("kl", logp, logq)
        tensor([ 0.5000, -0.5000])
    """
    return _of(name).reward(_log_ratio(logp, logq))


def exact(name: str, logits_p: torch.Tensor, logits_q: torch.Tensor) -> torch.Tensor:
    """The divergence of two distributions over the last dimension; of the paper's penalties, their mean under p.

    Args:
        name: one of ``NAMES``.
        logits_p: ``[..., V]``, log-probabilities up to a constant; -inf is probability 0.
        logits_q: of the same shape.

    Returns:
        ``[...]``, float32 (float64 if an argument is); infinite where the divergence is.

    Raises ValueError for another name or other shapes, TypeError for what is no floating tensor.

    Examples:
        >>> import torch
        >>> from lowrank_kernels import rlhf
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> print(round(rlhf.divergences.exact("tv", p, q).item(), 6))
        0.25
    """
    of = _of(name)
    p, q = _floating("logits_p", logits_p, "logits_q", logits_q)
    if p.dim() == 0 or p.shape[-1] == 0:
        raise ValueError(f"logits_p: expected [..., V] with V >= 1, got {tuple(p.shape)}")
    logp, logq = p.log_softmax(-1), q.log_softmax(-1)
    p, q = logp.exp(), logq.exp()
    # What neither ever chooses adds nothing; without this its gradients were 0 · NaN.
    never = (logp == -math.inf) & (logq == -math.inf)
    logp, logq = logp.masked_fill(never, 0.0), logq.masked_fill(never, 0.0)
    return of.exact(p, q, logp, logq).sum(-1)


def _of(name: str) -> _Divergence:
    if name not in _TABLE:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    return _TABLE[name]


def _log_ratio(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    logp, logq = _floating("logp", logp, "logq", logq)
    return logp - logq


def _floating(name_p: str, p: torch.Tensor, name_q: str, q: torch.Tensor):
    """Both in float32, or in float64 if one is."""
    for name, tensor in ((name_p, p), (name_q, q)):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: expected a floating tensor, got {got}")
    if p.shape != q.shape:
        raise ValueError(
            f"{name_q}: expected the shape of {name_p}, {tuple(p.shape)}, got {tuple(q.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(p.dtype, q.dtype), torch.float32)
    return p.to(dtype), q.to(dtype)
