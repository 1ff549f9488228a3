"""Log-probabilities and entropies of tokens from hidden states, without the logits of all rows at once.

A language model's head gives V logits for each row, mostly more numbers than all its hidden states. Here the rows go
through the head in chunks of one size, the last one filled up, so that the head sees the same shape in every call: a
row's log-probability then has the same bits whichever other rows are scored with it, as far as the head's matrix
product keeps to that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from . import divergences

_ROWS = {"cpu": 64}  # of a chunk
_ROWS_ELSEWHERE = 512

Head = Callable[[torch.Tensor], torch.Tensor]


class LogProbs(NamedTuple):
    """float32 ``[rows]``; ``entropy`` in nats, None unless asked for."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None


def logprobs(
    hidden: torch.Tensor,
    head: Head,
    ids: torch.Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int | None = None,
) -> LogProbs:
    """``log softmax(head(hidden) / temperature)[ids]`` of each row, and the entropy of its distribution.

    With gradients the head's product of a chunk is computed again in backward: never are there more than ``chunk`` rows
    of logits.

    Args:
        hidden: ``[rows, D]``.
        head: ``[chunk, D] -> [chunk, V]``: a linear layer, or a function that also scales or caps its logits.
        ids: ``[rows]``, integers below V.
        temperature: positive.
        entropy: whether to compute it.
        chunk: rows of one call of ``head``; None: 64 on CPUs, 512 elsewhere.

    Returns:
        :class:`LogProbs`, differentiable in ``hidden`` and the head's parameters.

    Raises ValueError for other shapes, a temperature <= 0 or a chunk < 1.

    Examples:
        >>> import torch
        >>> from lowrank_kernels import rlhf
        >>> head = torch.nn.Linear(8, 100, bias=False)
        >>> rlhf.logprobs(torch.randn(5, 8), head, torch.arange(5)).logprobs.shape
        torch.Size([5])
    """
    if hidden.dim() != 2:
        raise ValueError(f"hidden: expected [rows, D], got {list(hidden.shape)}")
    if ids.shape != hidden.shape[:1]:
        raise ValueError(f"ids: expected [{len(hidden)}], got {list(ids.shape)}")
    rows = _chunk_rows(hidden, chunk, temperature)

    def of_chunk(part: torch.Tensor, part_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _of_logits(head(part).float() / temperature, part_ids, entropy)

    return LogProbs(*_in_chunks(of_chunk, rows, hidden, ids), *([] if entropy else [None]))


def divergence_of(
    name: str,
    hidden_p: torch.Tensor,
    hidden_q: torch.Tensor,
    head: Head,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> torch.Tensor:
    """:func:`divergences.exact` of each row's two distributions, float32 ``[rows]``, without gradients.

    ``hidden_p``, ``hidden_q``: ``[rows, D]``; the others and errors as of :func:`logprobs`.

    Examples:
        >>> import torch
        >>> from lowrank_kernels import rlhf
        >>> head, hidden = torch.nn.Linear(8, 100, bias=False), torch.randn(5, 8)
        >>> rlhf.divergence_of("kl", hidden, hidden, head)
        tensor([0., 0., 0., 0., 0.])
    """
    if hidden_p.dim() != 2 or hidden_p.shape != hidden_q.shape:
        raise ValueError(
            "hidden_p, hidden_q: expected [rows, D] of one shape, got "
            f"{list(hidden_p.shape)} and {list(hidden_q.shape)}"
        )
    rows = _chunk_rows(hidden_p, chunk, temperature)

    def of_chunk(p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = (head(part).float() / temperature for part in (p, q))
        return (divergences.exact(name, *logits),)

    with torch.no_grad():
        return _in_chunks(of_chunk, rows, hidden_p, hidden_q)[0]


def logprobs_of_two(
    name: str,
    hidden_p: torch.Tensor,
    hidden_q: torch.Tensor,
    head: Head,
    ids: torch.Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[tuple[LogProbs, LogProbs], torch.Tensor]:
    """:func:`logprobs` of both, that of p with its entropy if asked for, and their :func:`divergence_of`, in one pass.

    The log-probabilities have the bits of :func:`logprobs`, since the head sees the same chunks, and its gradients; the
    divergence has none.
    """
    rows = _chunk_rows(hidden_p, None, temperature)

    def of_chunk(p, q, part_ids) -> tuple[torch.Tensor, ...]:
        p, q = (head(part).float() / temperature for part in (p, q))
        with torch.no_grad():
            apart = divergences.exact(name, p, q)
        return *_of_logits(p, part_ids, entropy), *_of_logits(q, part_ids, False), apart

    *of_p, of_q, apart = _in_chunks(of_chunk, rows, hidden_p, hidden_q, ids)
    return (LogProbs(*of_p, *([] if entropy else [None])), LogProbs(of_q, None)), apart


def _of_logits(logits: torch.Tensor, ids: torch.Tensor, entropy: bool) -> tuple[torch.Tensor, ...]:
    """The log-probabilities of ``ids``, and the entropies if asked for."""
    normalizer = logits.logsumexp(-1)
    chosen = logits.gather(-1, ids[:, None])[:, 0] - normalizer
    if not entropy:
        return (chosen,)
    return chosen, normalizer - (logits.softmax(-1) * logits.nan_to_num(neginf=0)).sum(-1)


def _chunk_rows(hidden: torch.Tensor, chunk: int | None, temperature: float) -> int:
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number > 0, got {temperature!r}")
    if chunk is None:
        return _ROWS.get(hidden.device.type, _ROWS_ELSEWHERE)
    if chunk < 1:
        raise ValueError(f"chunk: expected an integer >= 1, got {chunk!r}")
    return chunk


def _in_chunks(function: Callable, rows: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """What ``function`` gives for ``rows`` rows of each tensor at a time, joined."""
    count = len(tensors[0])
    if count == 0:
        return [torch.cat(of) for of in zip(*[function(*(t[:0] for t in tensors))])]
    results = []
    for start in range(0, count, rows):
        parts = [t[start : start + rows] for t in tensors]
        missing = rows - len(parts[0])
        if missing:  # rows of zeros, of which nothing is used
            parts = [F.pad(t, (0, 0) * (t.dim() - 1) + (0, missing)) for t in parts]
        if torch.is_grad_enabled():
            outputs = checkpoint(function, *parts, use_reentrant=False, preserve_rng_state=False)
        else:
            outputs = function(*parts)
        results.append([output[: rows - missing] for output in outputs])
    return [torch.cat(of) for of in zip(*results)]
