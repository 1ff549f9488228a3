"""Samplers: who writes the completions that PPO learns from.

A sampler may be another program on other numbers than the scoring pass, in 16 bits say. So log-probabilities of the
policy that sampled come from :meth:`RoleModel.score`, never from a sampler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from .roles import RoleModel


class Sampling(NamedTuple):
    """How to sample: from the whole distribution of ``logits / temperature``."""

    max_new_tokens: int
    temperature: float
    eos_token_id: int
    pad_token_id: int


class Rollout(NamedTuple):
    """Prompts and completions.

    ``ids``, ``mask [B, S]``: the prompt, padded on its left, in the first ``prompt_length`` columns, then the
    completion; the mask keeps a completion up to its end token, that one included. ``logprobs [B, S - 1]``: the
    sampler's own, for comparison, or None.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    prompt_length: int
    logprobs: torch.Tensor | None = None

    @property
    def of_completion(self) -> torch.Tensor:
        """``[B, S - 1]``, true at s where token s + 1 is one of the completion."""
        where = self.mask[:, 1:] != 0
        where[:, : self.prompt_length - 1] = False
        return where


class Sampler(Protocol):
    """What PPO asks of a sampler."""

    def generate(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling) -> Rollout:
        """``n`` completions of each prompt, given as token ids: rows in the order of prompts, n of each in a row."""

    def sync(self, policy: RoleModel, version: int) -> None:
        """Before each rollout: the policy as it is now; ``version`` counts its optimizer steps."""


class TransformersSampler:
    """``model.generate`` of transformers on the layers that train; there is nothing to synchronize.

    Examples:
        >>> import torch, transformers, lowrank_kernels as lk
        >>> from lowrank_kernels import rlhf
        >>> sizes = dict(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
        >>> heads = dict(num_attention_heads=2, num_key_value_heads=2)
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
        >>> report = lk.replace_linear(model, r=0, progress=False)
        >>> sampler = rlhf.TransformersSampler(rlhf.RoleModel(model, r=8))
        >>> sampling = rlhf.Sampling(max_new_tokens=4, temperature=1.0, eos_token_id=2, pad_token_id=0)
        >>> rollout = sampler.generate([[5, 6, 7], [8]], 2, sampling)
        >>> rollout.prompt_length, len(rollout.ids)
        (3, 4)
    """

    def __init__(self, roles: RoleModel) -> None:
        self.roles = roles

    def generate(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling) -> Rollout:
        """See :class:`Sampler`.

        Raises ValueError for an empty prompt.

        Examples:
            >>> import torch, transformers, lowrank_kernels as lk
            >>> from lowrank_kernels import rlhf
            >>> sizes = dict(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
            >>> heads = dict(num_attention_heads=2, num_key_value_heads=2)
            >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
            >>> report = lk.replace_linear(model, r=0, progress=False)
            >>> sampler = rlhf.TransformersSampler(rlhf.RoleModel(model, r=8))
            >>> sampler.generate([[5, 6]], 1, rlhf.Sampling(4, 1.0, 2, 0)).ids[:, :2]
            tensor([[5, 6]])
        """
        ids, mask = padded_left(prompts, sampling.pad_token_id)
        device = self.roles.value_head.weight.device
        ids, mask = (t.repeat_interleave(n, 0).to(device) for t in (ids, mask))
        tokens = self.roles.generate(
            ids, mask, do_sample=True, temperature=sampling.temperature, top_k=0, top_p=1.0, min_p=None,
            typical_p=1.0, repetition_penalty=1.0, no_repeat_ngram_size=0, num_beams=1, num_return_sequences=1,
            max_length=None, max_new_tokens=sampling.max_new_tokens, min_new_tokens=None,
            eos_token_id=sampling.eos_token_id, pad_token_id=sampling.pad_token_id, return_dict_in_generate=False,
        )  # fmt: skip
        return ended(tokens, mask, sampling)

    def sync(self, policy: RoleModel, version: int) -> None:
        """Nothing: the sampler runs on the layers that train.

        Examples:
            >>> from lowrank_kernels import rlhf
            >>> rlhf.TransformersSampler(None).sync(None, 0)
        """


def padded_left(
    prompts: Sequence[Sequence[int]], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask ``[B, P]`` of prompts of any lengths."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("prompts: expected a token in each, got an empty one")
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, length - len(prompt) :] = 1
    return ids, mask


def ended(tokens: torch.Tensor, prompt_mask: torch.Tensor, sampling: Sampling) -> Rollout:
    """A rollout of prompts and what was generated behind them: up to the first end token, padding from there on."""
    length = prompt_mask.shape[1]
    is_end = (tokens[:, length:] == sampling.eos_token_id).long()
    kept = (is_end.cumsum(1) - is_end == 0).long()
    mask = torch.cat([prompt_mask, kept], 1)
    return Rollout(tokens.where(mask.bool(), sampling.pad_token_id), mask, length)
