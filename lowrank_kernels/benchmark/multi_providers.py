"""The implementations compared where each row has one of many adapters.

All read the same values. The batches of a case take turns over adapters of their own, so that not even
a batch with one adapter finds it in a cache; rows of one adapter are adjacent, as Punica has them.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F

import lowrank_kernels as lk
from lowrank_kernels.multi_lora.functional import multi_lora_linear_4bit

from . import providers
from .case import MIX, POOL, Case
from .providers import SCALING, Calls, Unavailable, copies, each, weights_4bit, x_of

MAX_BYTES = 2 << 30  # of the adapters of one provider, whatever cache the system reports
PADDED = max(MIX)


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
    make = functools.partial(providers._random, dtype=dtype, device=device)
    return [
        (make(r, K, seed=100 + u, scale=K**-0.5), make(N, r, seed=500 + u, scale=0.01))
        for u, r in enumerate(pool.ranks)
    ]


def _copies(case: Case, rank: int = 0) -> int:
    nbytes = pool_of(case).nbytes(rank)
    return max(1, min(copies(case, nbytes), MAX_BYTES // nbytes))


def _turns(case: Case, count: int) -> list[tuple[int, int]]:
    """(copy of the pool, group of adapters) of each call; call i has group ``i % case.groups``."""
    return list(itertools.product(range(count), range(case.groups)))


def group_of(case: Case, group: int) -> range:
    """The adapters of a group, in the order of the rows."""
    count = len(case.rows)
    return range(group * count, (group + 1) * count)


def _segments(case: Case) -> list[slice]:
    ends = list(itertools.accumulate(case.rows))
    return [slice(end - rows, end) for end, rows in zip(ends, case.rows)]


def of_group(case: Case, group: int) -> list[tuple]:
    """(rows, A, B) of each adapter of a group, A and B in float32."""
    pool = adapters_of(pool_of(case))
    pairs = [pool[u] for u in group_of(case, group)]
    return [(rows, A.float(), B.float()) for rows, (A, B) in zip(_segments(case), pairs)]


def _y_of(case: Case) -> torch.Tensor:
    return torch.zeros(case.M, case.N, dtype=case.torch_dtype, device=case.device)


def _xy(case: Case, turns: list) -> list[tuple]:
    """(y, x, turn) for every turn."""
    return [(y, x, turn) for y, (x, turn) in each(case, _y_of(case), each(case, x_of(case), turns))]


# -- this library ----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _bank(pool: Pool, count: int, rank: int = 0) -> lk.AdapterBank:
    """A bank of ``count`` modules, each with all adapters of the pool, stored at ``rank`` where given."""
    w = providers._weight(pool.N, pool.K, pool.device)
    layers = {f"layer{i}": lk.LoRALinear4bit.from_weight(w) for i in range(count)}
    pages = sum(-(-(rank or r) // 8) for r in pool.ranks)
    bank = lk.AdapterBank(layers, pages, dtype=pool.dtype)
    for u, (A, B) in enumerate(adapters_of(pool)):
        if rank:
            A, B = F.pad(A, (0, 0, 0, rank - len(A))), F.pad(B, (0, rank - len(A)))
        state = {}
        for name in layers:
            state |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        bank.load(str(u), state, lora_alpha=SCALING * len(A))
    return bank


def _planned(case: Case, rank: int = 0) -> list[tuple]:
    """(plan, pages) of every turn."""
    count = _copies(case, rank)
    bank = _bank(pool_of(case), count, rank)
    plans = [bank.plan([str(u) for u in group_of(case, g)], case.rows) for g in range(case.groups)]
    return [(plans[group], bank[f"layer{c}"]) for c, group in _turns(case, count)]


def many_lowrank(case: Case, rank: int = 0) -> Calls:
    return [
        functools.partial(lk.multi_lora_, y, x, *turn)
        for y, x, turn in _xy(case, _planned(case, rank))
    ]


def many_lowrank_padded(case: Case) -> Calls:
    return many_lowrank(case, PADDED)


# -- PyTorch ---------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _separate(pool: Pool, count: int) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    return [[(A.clone(), B.clone()) for A, B in adapters_of(pool)] for _ in range(count)]


@functools.lru_cache(maxsize=1)
def _stacked(pool: Pool, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A [adapters, R, K] and B [adapters, N, R] with R the largest rank, zeros past an adapter's own."""
    R = max(pool.ranks)
    A = torch.stack([F.pad(A, (0, 0, 0, R - len(A))) for A, _ in adapters_of(pool)])
    B = torch.stack([F.pad(B, (0, R - B.shape[1])) for _, B in adapters_of(pool)])
    return [(A.clone(), B.clone()) for _ in range(count)]


def _with_rows(case: Case) -> list[list[tuple]]:
    """(rows, A, B) of each adapter, for every turn."""
    count = _copies(case)
    pool, segments = _separate(pool_of(case), count), _segments(case)
    return [
        [(rows, *pool[c][u]) for rows, u in zip(segments, group_of(case, group))]
        for c, group in _turns(case, count)
    ]


def _loop(y, x, adapters):
    for rows, A, B in adapters:
        y[rows] += SCALING * (x[rows] @ A.T) @ B.T
    return y


def _loop_in_place(y, x, adapters):
    for rows, A, B in adapters:
        y[rows].addmm_(x[rows] @ A.T, B.T, alpha=SCALING)
    return y


def many_loop(case: Case) -> Calls:
    return [functools.partial(_loop, *xy) for xy in _xy(case, _with_rows(case))]


def many_loop_in_place(case: Case) -> Calls:
    return [functools.partial(_loop_in_place, *xy) for xy in _xy(case, _with_rows(case))]


def _indexed(case: Case) -> list[tuple]:
    """(A and B of all adapters, the adapter of each row), for every turn."""
    count = _copies(case, max(case.ranks))
    pool, rows = _stacked(pool_of(case), count), torch.tensor(case.rows)
    indices = [
        torch.tensor(group_of(case, g)).repeat_interleave(rows).to(case.device)
        for g in range(case.groups)
    ]
    return [(*pool[c], indices[group]) for c, group in _turns(case, count)]


def _gather_bmm(y, x, A, B, index):
    s = torch.bmm(A.index_select(0, index), x.unsqueeze(2))
    return y.add_(torch.bmm(B.index_select(0, index), s).squeeze(2), alpha=SCALING)


def many_gather_bmm(case: Case) -> Calls:
    return [functools.partial(_gather_bmm, y, x, *turn) for y, x, turn in _xy(case, _indexed(case))]


# -- vLLM ------------------------------------------------------------------------------------------


def _vllm_cpu(y, x, A, B, index):
    """Shrink into a float32 buffer, expand into y; for prefill and decode alike.

    Each takes the adapter of every row out of the stack, which makes a copy, and casts that to the
    dtype of what it writes.
    """
    s = torch.zeros(len(x), A.shape[1], device=x.device)
    s[:] = SCALING * torch.einsum("bi,boi->bo", x.to(s.dtype), A[index].to(s.dtype))
    y[:] += torch.einsum("bi,boi->bo", s.to(y.dtype), B[index].to(y.dtype))
    return y


def many_vllm_cpu(case: Case) -> Calls:
    """What vllm/lora/ops/torch_ops does, written here after its source, not run from it."""
    return [functools.partial(_vllm_cpu, y, x, *turn) for y, x, turn in _xy(case, _indexed(case))]


def many_vllm_triton(case: Case) -> Calls:
    """The scheme of vllm/lora/ops/triton_ops at its default sizes, written here after its source."""
    try:
        from . import vllm_triton
    except ImportError as error:
        raise Unavailable(f"triton: {error}") from None
    calls = []
    for y, x, (A, B, index) in _xy(case, _indexed(case)):
        batch = vllm_triton.sorted_batch(index)
        calls.append(functools.partial(vllm_triton.add, y, x, A, B, batch, SCALING))
    return calls


# -- with the base in 4 bits -----------------------------------------------------------------------


def _with_weights(case: Case, turns: list) -> list[tuple]:
    """(weight, turn) until both have all been there."""
    weights = weights_4bit(case)
    number = max(len(turns), -(-len(weights) // len(turns)) * len(turns))
    return list(itertools.islice(zip(itertools.cycle(weights), itertools.cycle(turns)), number))


def many_linear_lowrank(case: Case) -> Calls:
    """The layers' call, base and adapters in one operator."""
    return [
        functools.partial(multi_lora_linear_4bit, x, w, *turn)
        for x, (w, turn) in each(case, x_of(case), _with_weights(case, _planned(case)))
    ]


def many_linear_separate(case: Case) -> Calls:
    def both(x, w, turn):
        return lk.multi_lora_(lk.linear_4bit(x, w), x, *turn)

    pairs = each(case, x_of(case), _with_weights(case, _planned(case)))
    return [functools.partial(both, x, *pair) for x, pair in pairs]


def many_linear_loop(case: Case) -> Calls:
    def both(x, w, turn):
        return _loop_in_place(lk.linear_4bit(x, w), x, turn)

    pairs = each(case, x_of(case), _with_weights(case, _with_rows(case)))
    return [functools.partial(both, x, *pair) for x, pair in pairs]


# -- training: forward and the gradients of x and of every A and B ---------------------------------


def _parameters(case: Case) -> list[torch.Tensor]:
    """A and B of each adapter of the batch, in turn."""
    adapters = adapters_of(pool_of(case))[: len(case.rows)]
    return [t.detach().clone().requires_grad_() for pair in adapters for t in pair]


def _trainable_layer(case: Case, w: lk.Weight4bit) -> lk.LoRALinear4bit:
    """A layer with the batch's adapters as its own, named "0", "1", ..."""
    layer, values = lk.LoRALinear4bit.from_weight(w), iter(_parameters(case))
    for u, rank in enumerate(case.ranks):
        layer.add_adapter(str(u), rank, lora_alpha=SCALING * rank)
        for parameter in layer.adapter_parameters(str(u)):
            parameter.data = next(values).detach()
    return layer


def many_training_lowrank(case: Case) -> Calls:
    """The layers' call under a plan whose adapters are the model's own and want gradients."""
    layers = {f"layer{i}": _trainable_layer(case, w) for i, w in enumerate(weights_4bit(case))}
    names = [str(u) for u in range(len(case.rows))]
    bank = lk.AdapterBank(layers, sum(-(-rank // 8) for rank in case.ranks))
    for name in names:
        bank.load(name)
    bank.trainable(*names)
    plan, calls = bank.plan(names, case.rows), []
    for name, layer in layers.items():
        rest = {"w": layer.weight4bit, "plan": plan, "pages": bank[name]}
        parameters = [t for n in names for t in layer.adapter_parameters(n)]
        calls.append((functools.partial(multi_lora_linear_4bit, **rest), parameters))
    return providers._lora_calls(case, calls)


def _training_calls(case: Case, forward) -> Calls:
    """``forward(x, w, segments, parameters)`` of every weight."""
    parameters, segments = _parameters(case), _segments(case)
    triples = list(zip(segments, parameters[::2], parameters[1::2]))
    layers = [lambda x, w=w: forward(x, w, triples) for w in weights_4bit(case)]
    return providers._lora_calls(case, [(layer, parameters) for layer in layers])


def many_training_one_by_one(case: Case) -> Calls:
    def forward(x, w, triples):
        return torch.cat([lk.lora_linear_4bit(x[r], w, A, B, SCALING) for r, A, B in triples])

    return _training_calls(case, forward)


def _deltas(x: torch.Tensor, triples: list[tuple]) -> torch.Tensor:
    return torch.cat([SCALING * F.linear(F.linear(x[rows], A), B) for rows, A, B in triples])


def many_training_loop(case: Case) -> Calls:
    return _training_calls(case, lambda x, w, triples: lk.linear_4bit(x, w) + _deltas(x, triples))


def many_training_dequantize(case: Case) -> Calls:
    def forward(x, w, triples):
        return F.linear(x, w.dequantize(x.dtype)) + _deltas(x, triples)

    return _training_calls(case, forward)
