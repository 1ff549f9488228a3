"""Alignment on one 4-bit base: divergences, advantages, losses, and PPO whose roles are adapters.

``from lowrank_kernels import rlhf`` needs torch alone; the names of ``_LATER`` need transformers, and are imported
when somebody asks for them.
"""

import importlib
import typing

from . import divergences
from .advantages import ScoreStatistics, gae, token_rewards, whiten
from .control import AdaptiveKL, FixedKL
from .logprobs import divergence_of, logprobs
from .losses import policy_loss, ranking_loss, value_loss

# name -> module of this package
_LATER = {
    "ROLES": "roles",
    "RoleModel": "roles",
    "Rollout": "rollout",
    "Sampler": "rollout",
    "Sampling": "rollout",
    "TransformersSampler": "rollout",
    "PPOConfig": "config",
    "PPOTrainer": "ppo",
    "RankingTrainer": "ranking",
}

__all__ = [
    "AdaptiveKL",
    "FixedKL",
    "ScoreStatistics",
    "divergence_of",
    "divergences",
    "gae",
    "logprobs",
    "policy_loss",
    "ranking_loss",
    "token_rewards",
    "value_loss",
    "whiten",
    *_LATER,
]

if typing.TYPE_CHECKING:
    from .config import PPOConfig
    from .ppo import PPOTrainer
    from .ranking import RankingTrainer
    from .roles import ROLES, RoleModel
    from .rollout import Rollout, Sampler, Sampling, TransformersSampler


def __getattr__(name: str):
    if name in _LATER:
        return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
