"""The implementations compared where each row has one of many adapters.

All read the same values. The batches of a case take turns over adapters of their own, so that not even
a batch with one adapter finds it in a cache; rows of one adapter are adjacent, as Punica has them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

import lowrank_kernels as lk
from lowrank_kernels.multi_lora.functional import multi_lora_linear_4bit

from . import providers
from .case import POOL, Case
from .providers import SCALING, Calls, call_each, copies, each, weights_4bit, x_of

MAX_BYTES = 2 << 30  # of the adapters of one provider, whatever cache the system reports


class Pool(NamedTuple):
    """The adapters of all cases of a shape, dtype and rank: what is made once and kept between cases."""

    N: int
    K: int
    ranks: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def nbytes(self, rank: int = 0) -> int:
        """``rank``: that all are stored at; 0: each at its own."""
        ranks = rank * len(self.ranks) or sum(self.ranks)
        return ranks * (self.N + self.K) * self.dtype.itemsize


def pool_of(case: Case) -> Pool:
    size = max(POOL, len(case.rows)) if case.groups > 1 else len(case.rows)
    ranks = tuple(case.ranks) if case.mixed else (case.R,) * size
    return Pool(case.N, case.K, ranks, case.torch_dtype, case.device)


@functools.lru_cache(maxsize=1)
def adapters_of(pool: Pool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A [r, K] and B [N, r] of each adapter; one pool is held at a time."""
    N, K, _, dtype, device = pool
    make = functools.partial(providers.random_tensor, dtype=dtype, device=device)
    return [
        (make(r, K, seed=100 + u, scale=K**-0.5), make(N, r, seed=500 + u, scale=0.01))
        for u, r in enumerate(pool.ranks)
    ]


def pool_copies(case: Case, rank: int = 0) -> int:
    nbytes = pool_of(case).nbytes(rank)
    return max(1, min(copies(case, nbytes), MAX_BYTES // nbytes))


def turns(case: Case, count: int) -> list[tuple[int, int]]:
    """(copy of the pool, group of adapters) of each call; call i has group ``i % case.groups``."""
    return list(itertools.product(range(count), range(case.groups)))


def group_of(case: Case, group: int) -> range:
    """The adapters of a group, in the order of the rows."""
    count = len(case.rows)
    return range(group * count, (group + 1) * count)


def segments(case: Case) -> list[slice]:
    ends = list(itertools.accumulate(case.rows))
    return [slice(end - rows, end) for end, rows in zip(ends, case.rows)]


def of_group(case: Case, group: int) -> list[tuple]:
    """(rows, A, B) of each adapter of a group, A and B in float32."""
    pool = adapters_of(pool_of(case))
    pairs = [pool[u] for u in group_of(case, group)]
    return [(rows, A.float(), B.float()) for rows, (A, B) in zip(segments(case), pairs)]


# -- this library ----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _bank(pool: Pool, count: int) -> lk.AdapterBank:
    """A bank of ``count`` modules, each with all adapters of the pool."""
    w = providers.weight_of(pool.N, pool.K, pool.device)
    layers = {f"layer{i}": lk.LoRALinear4bit.from_weight(w) for i in range(count)}
    bank = lk.AdapterBank(layers, sum(-(-r // 8) for r in pool.ranks), dtype=pool.dtype)
    for u, (A, B) in enumerate(adapters_of(pool)):
        state = {}
        for name in layers:
            state |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        bank.load(str(u), state, lora_alpha=SCALING * len(A))
    return bank


def planned(case: Case) -> list[tuple]:
    """(plan, pages) of every turn."""
    count = pool_copies(case)
    bank = _bank(pool_of(case), count)
    plans = [bank.plan([str(u) for u in group_of(case, g)], case.rows) for g in range(case.groups)]
    return [(plans[group], bank[f"layer{c}"]) for c, group in turns(case, count)]


def many_added(function: Callable, of_turns: Callable) -> Callable[[Case], Calls]:
    """What makes the calls ``function(y, x, *turn)`` of a case, which add to y; one y per call on a GPU."""

    def calls(case: Case) -> Calls:
        y = torch.zeros(case.M, case.N, dtype=case.torch_dtype, device=case.device)
        pairs = each(case, y, each(case, x_of(case), of_turns(case)))
        return [functools.partial(function, y, x, *turn) for y, (x, turn) in pairs]

    return calls


many_lowrank = many_added(lk.multi_lora_, planned)


# -- PyTorch ---------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _separate(pool: Pool, count: int) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    return [[(A.clone(), B.clone()) for A, B in adapters_of(pool)] for _ in range(count)]


def with_rows(case: Case) -> list[list[tuple]]:
    """(rows, A, B) of each adapter, for every turn."""
    count = pool_copies(case)
    pool, of_rows = _separate(pool_of(case), count), segments(case)
    return [
        [(rows, *pool[c][u]) for rows, u in zip(of_rows, group_of(case, group))]
        for c, group in turns(case, count)
    ]


def loop_in_place(y: torch.Tensor, x: torch.Tensor, *adapters: tuple) -> torch.Tensor:
    for rows, A, B in adapters:
        y[rows].addmm_(x[rows] @ A.T, B.T, alpha=SCALING)
    return y


# -- with the base in 4 bits -----------------------------------------------------------------------


def with_weights(case: Case, of_turns: list) -> list[tuple]:
    """(weight, turn) until both have all been there."""
    weights = weights_4bit(case)
    number = max(len(of_turns), -(-len(weights) // len(of_turns)) * len(of_turns))
    pairs = zip(itertools.cycle(weights), itertools.cycle(of_turns))
    return list(itertools.islice(pairs, number))


def many_linear(function: Callable, of_turns: Callable) -> Callable[[Case], Calls]:
    """What makes the calls ``function(x, w, *turn)`` of a case, turns and weights until both have all been there."""

    def calls(case: Case) -> Calls:
        pairs = with_weights(case, of_turns(case))
        return call_each(case, lambda x, pair: function(x, pair[0], *pair[1]), x_of(case), pairs)

    return calls


# The layers' call, base and adapters in one operator; the base, then torch adapter by adapter.
many_linear_lowrank = many_linear(multi_lora_linear_4bit, planned)
many_linear_loop = many_linear(
    lambda x, w, *adapters: loop_in_place(lk.linear_4bit(x, w), x, *adapters), with_rows
)
