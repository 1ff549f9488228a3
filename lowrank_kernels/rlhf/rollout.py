"""Samplers: who writes the completions that PPO learns from.

A sampler may be another program on other numbers than the scoring pass, in 16 bits say. So log-probabilities of the
policy that sampled come from :meth:`RoleModel.score`, never from a sampler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import transformers

from .roles import RoleModel


class Sampling(NamedTuple):
    """How to sample: from the whole distribution of ``logits / temperature``.

    ``seeds``: one for each completion, which then depends on nothing else that is random; None: torch's generator.

    Examples:
        >>> from lowrank_kernels import rlhf
        >>> rlhf.Sampling(max_new_tokens=4, temperature=1.0, eos_token_id=2, pad_token_id=0).seeds is None
        True
    """

    max_new_tokens: int
    temperature: float
    eos_token_id: int
    pad_token_id: int
    seeds: tuple[int, ...] | None = None


class Rollout(NamedTuple):
    """Prompts and completions.

    ``ids``, ``mask [B, S]``: the prompt, padded on its left, in the first ``prompt_length`` columns, then the
    completion; the mask keeps a completion up to its end token, that one included. ``logprobs [B, S - 1]``: the
    sampler's own, of token s + 1 at s, or None.

    Examples:
        >>> import torch
        >>> from lowrank_kernels import rlhf
        >>> ids = torch.tensor([[0, 7, 5, 2], [6, 8, 4, 9]])
        >>> rlhf.Rollout(ids, ids.ne(0).long(), prompt_length=2).of_completion
        tensor([[False,  True,  True],
                [False,  True,  True]])
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

        Raises ValueError for an empty prompt, or another number of seeds.

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
        draws = _Draws(sampling, len(ids), device)
        # The greedy choice among the one token that is drawn. What the model's own settings ask for is overruled.
        tokens = self.roles.generate(
            ids, mask, logits_processor=transformers.LogitsProcessorList([draws]), do_sample=False, num_beams=1,
            temperature=None, top_k=None, top_p=None, min_p=None, typical_p=None, repetition_penalty=1.0,
            no_repeat_ngram_size=0, bad_words_ids=None, suppress_tokens=None, begin_suppress_tokens=None,
            forced_bos_token_id=None, forced_eos_token_id=None, num_return_sequences=1, max_length=None,
            min_length=0, max_new_tokens=sampling.max_new_tokens, min_new_tokens=None, use_cache=True,
            eos_token_id=sampling.eos_token_id, pad_token_id=sampling.pad_token_id, return_dict_in_generate=False,
        )  # fmt: skip
        return ended(tokens, mask, sampling)

    def sync(self, policy: RoleModel, version: int) -> None:
        """Nothing: the sampler runs on the layers that train.

        Examples:
            >>> from lowrank_kernels import rlhf
            >>> rlhf.TransformersSampler(None).sync(None, 0)
        """


class _Draws(transformers.LogitsProcessor):
    """Leaves of each row's tokens one, drawn with its probability: where a uniform number falls in their sum.

    The number of a row and a step is that of the row's seed, whatever else is in the batch.
    """

    def __init__(self, sampling: Sampling, rows: int, device: torch.device) -> None:
        seeds, steps = sampling.seeds, sampling.max_new_tokens
        if seeds is None:
            numbers = torch.rand(rows, steps, dtype=torch.float64)
        elif len(seeds) != rows:
            raise ValueError(
                f"sampling: expected {rows} seeds, one for each completion, got {len(seeds)}"
            )
        else:
            generators = (torch.Generator().manual_seed(seed) for seed in seeds)
            numbers = torch.stack(
                [torch.rand(steps, dtype=torch.float64, generator=g) for g in generators]
            )
        self.temperature, self.step = sampling.temperature, 0
        self.numbers = numbers.clamp(max=1 - 2**-40).to(device)  # below the sum after rounding too

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        sums = (scores.float() / self.temperature).softmax(-1).double().cumsum(-1)
        at = self.numbers[:, self.step, None] * sums[:, -1:]
        self.step += 1
        drawn = torch.searchsorted(sums, at, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


def check_rollout(rollout: Rollout, count: int) -> Rollout:
    """What a sampler returned, if it is a rollout of ``count`` completions; raises ValueError otherwise."""
    ids, mask, length, own = rollout
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"sampler: expected integers [B, S], got {ids.dtype} {list(ids.shape)}")
    if len(ids) != count:
        raise ValueError(f"sampler: expected {count} completions, got {len(ids)}")
    if mask.shape != ids.shape:
        raise ValueError(f"sampler: expected mask {list(ids.shape)}, got {list(mask.shape)}")
    if not 0 < length < ids.shape[1]:
        raise ValueError(
            f"sampler: expected prompts and completions in {ids.shape[1]} columns, got prompts of {length}"
        )
    if not bool((mask[:, length - 1 : length + 1] != 0).all()):
        raise ValueError(
            "sampler: expected a token in every completion, right behind its prompt, got none"
        )
    if own is not None and own.shape != mask[:, 1:].shape:
        raise ValueError(
            f"sampler: expected logprobs {list(mask[:, 1:].shape)}, got {list(own.shape)}"
        )
    return rollout


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
