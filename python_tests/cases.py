"""Problems for tests and benchmarks: shapes x dtypes x ranks x block sizes x formats, and their tensors.

Each operator runs a pairwise cover of the factors below (each pair of values of two factors occurs somewhere) and
random problems with fixed seeds, both ``SHARED`` among the backends, some ``LARGE`` ones, and the edges of its kernels
(edges.py); conftest.py says what runs where.
``make(op, case)`` gives the arguments of an operator.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

import torch

import lowrank_kernels as lk
from lowrank_kernels import Weight4bit, backends
from lowrank_kernels.arguments import (
    NESTED_BLOCKSIZE,
    RANK_STEP,
    ceil_div,
    each_given,
    each_pages,
    each_weight,
    given,
)
from lowrank_kernels.codebooks import BLOCKSIZES, QUANT_TYPES, code_of, dynamic_code
from lowrank_kernels.schema import ops

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
_SHORT = {F32: "f32", BF16: "bf16", F16: "f16", torch.uint8: "u8", None: "none"}


class Case(NamedTuple):
    """One problem. An operator that has no adapter or no base in 4 bits ignores those fields."""

    M: int = 5
    N: int = 33
    K: int = 96
    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = False
    dtype: torch.dtype = F32  # of x, dy and a dense weight
    bias: torch.dtype | None = None
    R: int = 8
    adapter: torch.dtype = F32  # of A and B
    scaling: float = 2.0
    dropout_p: float = 0.0
    storage: torch.dtype = torch.uint8  # that the packed bytes are presented in

    @property
    def slow(self) -> bool:
        """For scalar code and on the emulator."""
        return self.M * self.N * self.K > 20_000_000

    def __str__(self) -> str:
        return (
            f"{self.M}x{self.N}x{self.K}-{self.quant_type}-b{self.blocksize}"
            f"{'-dq' if self.double_quant else ''}-{_SHORT[self.dtype]}-bias_{_SHORT[self.bias]}"
            f"-r{self.R}_{_SHORT[self.adapter]}-s{self.scaling:g}-p{self.dropout_p:g}"
            f"-{_SHORT[self.storage]}"
        )


# Small ones of every kind, and 0; the sizes of the kernels' own tiles are in edges.py and test_cuda_*.py.
M_VALUES = (0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 65)
NK_VALUES = (
    (1, 1), (64, 1), (3, 5), (2, 31), (31, 33), (16, 64), (17, 65), (33, 63), (48, 96), (40, 128),
    (65, 127), (5, 1000), (100, 320), (3, 2048), (2, 4096), (129, 66),
)  # fmt: skip
FACTORS = {
    "M": M_VALUES,
    "NK": NK_VALUES,
    "quant_type": QUANT_TYPES,
    "blocksize": BLOCKSIZES,
    "double_quant": (False, True),
    "dtype": (F32, BF16, F16),
    "bias": (None, F32, BF16, F16),
    "R": (1, 3, 8, 12, 16, 20, 64, 100),
    "adapter": (F32, BF16, F16),
    "scaling": (1.0, 2.0, -0.25),
    "dropout_p": (0.0, 0.25),
    "storage": (torch.uint8, BF16, F32),
}


# Rows of whole blocks, where decoding has kernels of its own.
WHOLE_BLOCKS = FACTORS | {
    "M": (1, 2, 3, 4, 5, 17),
    "NK": tuple(itertools.product((1, 3, 16, 17, 64, 129), (1, 3))),  # K in blocks
}


def pairwise(factors: dict[str, tuple]) -> list[dict]:
    """Rows in which every two values of different factors meet; greedy, always the same."""
    names = list(factors)
    rows, done = [], set()

    def new_pairs(row: dict, name: str, value) -> int:
        return sum(frozenset((item, (name, value))) not in done for item in row.items())

    for a, b in itertools.combinations(names, 2):
        for pair in itertools.product(factors[a], factors[b]):
            if frozenset(zip((a, b), pair)) in done:
                continue
            row = dict(zip((a, b), pair))
            for i, name in enumerate(n for n in names if n not in row):
                # Of equally good values another one each time, so that triples vary as well.
                values = factors[name]
                turn = (len(rows) + i) % len(values)
                row[name] = max(
                    values[turn:] + values[:turn], key=lambda v, n=name: new_pairs(row, n, v)
                )
            done.update(map(frozenset, itertools.combinations(row.items(), 2)))
            rows.append(row)
    return rows


def _case(row: dict, whole_blocks: bool = False) -> Case:
    row = dict(row)
    N, K = row.pop("NK")
    return Case(N=N, K=K * row["blocksize"] if whole_blocks else K, **row)


def fuzz(count: int, seed: int, size: int) -> list[Case]:
    """Random problems with sides up to ``size``, small ones more often."""
    rng = random.Random(seed)

    def side(limit: int) -> int:
        return max(1, round(limit ** rng.random()))

    rows = []
    for _ in range(count):
        row = {name: rng.choice(values) for name, values in FACTORS.items()}
        row |= {"M": side(size // 4), "NK": (side(size), side(2 * size)), "R": side(64)}
        row["dropout_p"] = rng.choice((0.0, round(rng.random() * 0.9, 3)))
        rows.append(_case(row))
    return rows


# More than one tile and more than one thread's share in each dimension; widths of real models.
LARGE = [
    Case(1, 1536, 576), Case(4, 576, 1536, "fp4", 64, True, BF16, R=16, adapter=BF16),
    Case(3, 1024, 4096, "nf4", 4096, False, BF16, BF16, 64, dropout_p=0.05),
    Case(2, 513, 4097, "nf4", 64, True, F16, F32, 20), Case(1, 4096, 1024, "nf4", 128, True, F16),
    Case(64, 576, 1536, "nf4", 64, True, BF16, BF16, 16, F32, dropout_p=0.1),
    Case(65, 1536, 576, "nf4", 32, True, F32, F32, 16), Case(130, 300, 1000, "fp4", 256, False, F16),
    Case(257, 192, 576, "nf4", 64, True, BF16, None, 100, BF16), Case(33, 1025, 511, "nf4", 512),
    Case(512, 96, 320, "nf4", 64, True, F32, F32, 8, F32, dropout_p=0.5),
    Case(300, 33, 2050, "fp4", 64, True, BF16, F32, 64, F16), Case(17, 2048, 257, "nf4", 1024, True),
]  # fmt: skip

PAIRWISE = [_case(row) for row in pairwise(FACTORS)]
PAIRWISE += [_case(row, whole_blocks=True) for row in pairwise(WHOLE_BLOCKS)]
FUZZ = [*fuzz(40, seed=1, size=200), *fuzz(50, seed=2, size=700)]
SHARED = [*PAIRWISE, *FUZZ]
_WEIGHT = ("NK", "quant_type", "blocksize", "double_quant", "dtype", "storage")
# For operators on the weight alone.
WEIGHTS = [*map(_case, pairwise({name: FACTORS[name] for name in _WEIGHT})), *FUZZ[::4]]
# One of each kind, for tests that are not about shapes.
FEW = [
    Case(),
    Case(3, 33, 128, "fp4", 64, True, BF16, F32, 3, F32),
    Case(17, 31, 33, "nf4", 32, True, F16, F16, 12, BF16, dropout_p=0.25, storage=BF16),
    Case(1, 40, 512, "nf4", 128, False, F32, F32, 16, BF16, -0.5),
    Case(70, 65, 127, "fp4", 256, False, BF16, None, 100, BF16, dropout_p=0.5),
]


def family(op: str, case: Case, backend: str = "cpu") -> str:
    """The kernel family that runs; only within one are the bits of a row promised to be equal.

    CPU: one to four rows against a 4-bit weight whose blocks do not cross rows are decoded in registers
    ("gemv"); everything else goes through micro tiles ("gemm"), with AMX many rows through tile registers
    ("amx", where ``backend`` is "cpu-amx" and that is in use). GPU: see _gpu_family.
    """
    fits = "4bit" in op and case.K > 0 and case.K % case.blocksize == 0
    if backend in ("emulator", "cuda"):
        return _gpu_family(op, case, fits)
    if backend == "triton" and op.startswith("grouped"):  # lowrank_kernels/triton/grouped_linear.py
        return f"tile of {16 if case.M <= 16 * EXPERTS else 32} rows"
    if backend == "triton":  # as in lowrank_kernels/triton/matmul.py
        return (
            f"tile of up to {min(limit for limit in (16, 32, 64, 2**31) if limit >= case.M)} rows"
        )
    if 1 <= case.M <= 4 and fits:
        return "gemv"
    if backend == "cpu-amx":
        product = "dx" if "dx" in op or "backward" in op else "forward"
        dtype = case.dtype if fits else F32  # other weights are multiplied exactly
        if backends.kernels(dtype)[product]["amx"][0] <= case.M:
            return "amx"
    return "gemm"


def _gpu_family(op: str, case: Case, fits: bool) -> str:
    """As in csrc/cuda/launch/linear.cu, for tensors that begin at aligned addresses.

    The dense product ("matmul") promises nothing: its family is the number of rows itself.
    """
    if op.startswith("grouped"):  # csrc/cuda/launch/grouped.cu
        return "simt"
    backward = "dx" in op or "backward" in op
    rows, columns = case.M, case.N if backward else case.K  # of what meets the weight
    on_tensor_cores = fits and case.dtype != F32 and columns % 8 == 0
    if on_tensor_cores and not backward and case.blocksize >= 64 and rows <= 64:
        return "gemv"
    fused_rows = 320 if on_tensor_cores else 64
    if "4bit" not in op or rows > fused_rows:
        return f"matmul of {rows} rows"
    if not on_tensor_cores:
        return "simt"
    bucket = min(limit for limit in (16, 64, 128, 256, 512) if limit >= rows)
    return f"mma of up to {bucket} rows"


# -- tensors ---------------------------------------------------------------------------------------
# From torch's generator, which conftest.py seeds for each test.


def random_tensor(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def random_weight(case: Case) -> Weight4bit:
    """Random nibbles (all 16, and whatever in the padding) with scales about 1/sqrt(K)."""
    N, K = case.N, case.K
    size = ceil_div(ceil_div(N * K, 2), case.storage.itemsize) * case.storage.itemsize
    packed = torch.randint(0, 256, (size,), dtype=torch.uint8).view(case.storage)[:, None]
    blocks = ceil_div(N * K, case.blocksize)
    nested = {}
    if case.double_quant:
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
        nested = {
            "nested_absmax": (torch.rand(ceil_div(blocks, NESTED_BLOCKSIZE)) + 0.5) / K**0.5,
            "nested_code": dynamic_code(),
            "nested_offset": torch.tensor(1.5 / K**0.5),
        }
    else:
        absmax = (torch.rand(blocks) + 0.5) / K**0.5
    return Weight4bit(
        packed, absmax, code_of(case.quant_type), torch.Size((N, K)), case.dtype, case.quant_type,
        case.blocksize, **nested,
    )  # fmt: skip


def weight_of(op_args: tuple, case: Case) -> Weight4bit:
    """The weight whose ``op_args()`` these are."""
    packed, absmax, code, *nested, N, K, blocksize = op_args
    return Weight4bit(
        packed, absmax, code, torch.Size((N, K)), case.dtype, case.quant_type, blocksize, *nested
    )


def random_seed() -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)


def _base(op: str, case: Case) -> tuple:
    if "4bit" in op:
        return random_weight(case).op_args()
    return (random_tensor(case.N, case.K, dtype=case.dtype, scale=case.K**-0.5),)


def _bias(case: Case) -> torch.Tensor | None:
    return None if case.bias is None else random_tensor(case.N, dtype=case.bias)


def _adapter(case: Case) -> tuple:
    return (
        random_tensor(case.R, case.K, dtype=case.adapter, scale=case.K**-0.5),
        random_tensor(case.N, case.R, dtype=case.adapter, scale=case.R**-0.5),
        case.scaling,
    )


def _dropout(case: Case) -> tuple:
    return case.dropout_p, random_seed() if case.dropout_p else None


def _quantize(op, case):
    weight = random_tensor(case.N, case.K, dtype=case.dtype)
    return weight, code_of(case.quant_type), case.blocksize


def _double_quantize(op, case):
    return torch.rand(case.N * case.K) + 0.5, dynamic_code()


def _dequantize(op, case):
    return *_base(op, case), case.dtype


def _linear(op, case):
    return random_tensor(case.M, case.K, dtype=case.dtype), *_base(op, case), _bias(case)


def _linear_dx(op, case):
    return random_tensor(case.M, case.N, dtype=case.dtype), *_base(op, case)


def _lora(op, case):
    x = random_tensor(case.M, case.K, dtype=case.dtype)
    return x, *_base(op, case), *_adapter(case), _bias(case), *_dropout(case)


def _lora_backward(op, case):
    dy = random_tensor(case.M, case.N, dtype=case.dtype)
    x, s = random_tensor(case.M, case.K, dtype=case.dtype), random_tensor(case.M, case.R, dtype=F32)
    rest = (*_base(op, case), *_adapter(case), _bias(case), *_dropout(case))
    return dy, x, s, *rest, True, True, True, case.bias is not None


# -- many adapters ---------------------------------------------------------------------------------

SLOTS = 6  # of the tables; a batch uses some of them


def plan_args(
    slots: list[int], tokens: list[int], pages: dict[int, list[int]], max_rank: int
) -> tuple:
    """The plan's arguments for sequences with these slots (-1: no adapter) and numbers of tokens."""
    slot_of_row = [slot for slot, count in zip(slots, tokens) for _ in range(count)]
    rows_of = {u: [m for m, s in enumerate(slot_of_row) if s == u] for u in sorted({*slot_of_row})}
    rows_of.pop(-1, None)
    most = max(map(len, rows_of.values()), default=0)
    tile_rows = next((size for size in (16, 32, 64, 128) if size >= most), 128)
    tiles, page_ids, tile_of_row, rows = [], [], [-1] * len(slot_of_row), []
    for slot, of_slot in rows_of.items():
        for start in range(0, len(of_slot), tile_rows):
            part = of_slot[start : start + tile_rows]
            for m in part:
                tile_of_row[m] = len(tiles)
            tiles.append((slot, len(rows), len(part), len(page_ids)))
            rows += part
        page_ids += pages[slot]

    def ints(values):
        return torch.tensor(values, dtype=torch.int32)

    return (
        ints(tiles).view(-1, 4), ints(page_ids), ints(tile_of_row), ints(rows), tile_rows, max_rank,
    )  # fmt: skip


def _sequences(M: int, slots: int) -> tuple[list[int], list[int]]:
    """M rows cut into sequences, some empty, each with a slot or -1."""
    cuts = sorted(random.randrange(M + 1) for _ in range(random.choice((0, 1, 4, 9))))
    tokens = [b - a for a, b in zip((0, *cuts), (*cuts, M))]
    return [random.randrange(-1, slots) for _ in tokens], tokens


def multi_args(case: Case, slots: list[int] | None = None, tokens: list[int] | None = None):
    """(plan, pages): six adapters with ranks up to case.R, one of which does not cover the module."""
    page_rank = random.choice((8, 16))
    ranks = [random.randint(1, case.R) for _ in range(SLOTS)]
    ranks[random.randrange(SLOTS)] = 0
    ranks[random.randrange(SLOTS)] = case.R
    free = list(range(SLOTS * ceil_div(case.R, page_rank) + 2))
    random.shuffle(free)
    # A module that an adapter does not cover has its pages all the same; so may a smaller rank.
    pages = {
        u: [free.pop() for _ in range(max(1, ceil_div(r, page_rank)))] for u, r in enumerate(ranks)
    }
    if slots is None:
        slots, tokens = _sequences(case.M, SLOTS)
    shape = (SLOTS * ceil_div(case.R, page_rank) + 2, page_rank)
    A = random_tensor(*shape, case.K, dtype=case.adapter, scale=case.K**-0.5)
    B = random_tensor(*shape, case.N, dtype=case.adapter, scale=case.R**-0.5)
    used = {(pages[u][r // page_rank], r % page_rank) for u in pages for r in range(ranks[u])}
    for page, r in itertools.product(range(shape[0]), range(page_rank)):
        if (page, r) not in used:  # nobody may look there
            A[page, r], B[page, r] = torch.nan, torch.nan
    scalings = case.scaling * torch.tensor([random.choice((1.0, 0.5, 2.0)) for _ in ranks])
    dropout = [random.choice((case.dropout_p, case.dropout_p, 0.0)) for _ in ranks]
    seed = random_seed() if case.dropout_p else None
    return plan_args(slots, tokens, pages, max(ranks)), (
        A, B, torch.tensor(ranks, dtype=torch.int32), scalings.float(),
        torch.tensor(dropout, dtype=torch.float64), seed,
    )  # fmt: skip


def grad_args(ranks: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(grad_rows, grad_rank): most slots want gradients, in any order, with a gap."""
    rows, first = [-1] * len(ranks), random.choice((0, 3))
    for u in random.sample(range(len(ranks)), len(ranks)):
        if random.random() < 0.75:
            rows[u], first = first, first + int(ranks[u])
    return torch.tensor(rows, dtype=torch.int32), first


def _multi(op, case):
    plan, pages = multi_args(case)
    y = random_tensor(case.M, case.N, dtype=case.dtype)
    return y, random_tensor(case.M, case.K, dtype=case.dtype), *plan, *pages


def _multi_backward(op, case):
    plan, pages = multi_args(case)
    dy, x = (random_tensor(case.M, n, dtype=case.dtype) for n in (case.N, case.K))
    s = random_tensor(case.M, ceil_div(plan[-1], RANK_STEP) * RANK_STEP, dtype=F32)
    return dy, x, s, *plan, *pages, *grad_args(pages[2]), True


def _multi_linear(op, case):
    x = random_tensor(case.M, case.K, dtype=case.dtype)
    plan, pages = multi_args(case)
    return x, *_base(op, case), *plan, *pages, _bias(case)


def _multi_linear_backward(op, case):
    dy, x, s, *rest = _multi_backward(op, case)
    *plan_and_pages, grad_rows, grad_rank, need_dx = rest
    needs = (grad_rows, grad_rank, need_dx, case.bias is not None)
    return dy, x, s, *_base(op, case), *plan_and_pages, _bias(case), *needs


# -- several weights, one x ------------------------------------------------------------------------


def group_cases(case: Case) -> list[Case]:
    """The problems of the weights of a group: three that differ in all but x and what chooses the kernel."""
    return [
        case,
        case._replace(
            N=max(1, case.N // 3), double_quant=not case.double_quant, bias=F32, storage=torch.uint8
        ),
        case._replace(
            N=case.N + 3, quant_type="fp4", bias=None, R=case.R + 1, scaling=0.5,
            adapter=F16, storage=torch.uint8,
        ),
    ]  # fmt: skip


def _group(case: Case) -> tuple[list, list]:
    weights = [random_weight(of).op_args() for of in group_cases(case)]
    return _given([t for w in weights for t in w[:6]]), [n for w in weights for n in w[6:]]


def _given(tensors: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """As a list of a group has them: shape [0] for None."""
    return [torch.empty(0) if t is None else t for t in tensors]


def _lora_lists(case: Case) -> tuple:
    """A, B, scaling, bias, dropout_p and seed of three weights, of which the second has no adapter."""
    of = [(*_adapter(c), _bias(c), *_dropout(c)) for c in group_cases(case)]
    of[1] = None, None, 1.0, of[1][3], 0.0, None
    A, B, scaling, bias, dropout_p, seed = map(list, zip(*of))
    return _given(A), _given(B), scaling, _given(bias), dropout_p, _given(seed)


def _lora_group(op, case):
    return random_tensor(case.M, case.K, dtype=case.dtype), *_group(case), *_lora_lists(case)


def _lora_group_backward(op, case):
    of = group_cases(case)
    dy = [random_tensor(case.M, c.N, dtype=case.dtype) for c in of]
    x = random_tensor(case.M, case.K, dtype=case.dtype)
    ranks = of[0].R, 0, of[2].R
    s = [random_tensor(case.M, rank, dtype=F32) for rank in ranks]
    needs = [True, False, True], [True, False, True], [c.bias is not None for c in of]
    return dy, x, s, *_group(case), *_lora_lists(case), True, *needs


def _multi_lists(case: Case) -> tuple[tuple, list, list]:
    """Plan, pages and seeds of three weights: they share the plan, and the page ids of each adapter."""
    plan, pages = multi_args(case)
    A, B, ranks, scalings, dropout_p, seed = pages
    lists, seeds = [*pages[:5]], [seed]
    for c in group_cases(case)[1:]:
        own = random_tensor(*B.shape[:2], c.N, dtype=case.adapter, scale=case.R**-0.5)
        other = random_tensor(*A.shape, dtype=case.adapter, scale=case.K**-0.5)
        lists += [other, own, ranks // 2, scalings * 0.5, dropout_p]
        seeds.append(random_seed() if case.dropout_p else None)
    return plan, lists, _given(seeds)


def _multi_group(op, case):
    x = random_tensor(case.M, case.K, dtype=case.dtype)
    plan, pages, seeds = _multi_lists(case)
    return x, *_group(case), *plan, pages, seeds, _given([_bias(c) for c in group_cases(case)])


def _multi_group_backward(op, case):
    x, *rest = _multi_group(op, case)
    (plan, pages), of = (rest[2:8], rest[8]), group_cases(case)
    dy = [random_tensor(case.M, c.N, dtype=case.dtype) for c in of]
    width = ceil_div(plan[-1], RANK_STEP) * RANK_STEP
    s = [random_tensor(case.M, width, dtype=F32) for _ in of]
    grads = [grad_args(ranks) for ranks in pages[2::5]]
    grad_rows, grad_rank = map(list, zip(*grads))
    return dy, x, s, *rest, grad_rows, grad_rank, True, [c.bias is not None for c in of]


def of_each_weight(op: str, args: tuple) -> list[tuple[str, tuple] | None]:
    """The operators of single weights that a group stands for, with their arguments; None where a weight has no dy."""
    backward, many = op.endswith("backward"), op.startswith("multi")
    (dy, x, s), rest = (args[:3], args[3:]) if backward else ((None, args[0], None), args[1:])
    weights, dims, *rest = rest
    group, found = each_weight(weights, dims), []
    if many:
        *plan, pages, seed, bias = rest[:9]
        adapters = each_pages(pages, seed)
    else:
        A, B, scaling, bias, dropout_p, seed = rest[:6]
        adapters = list(zip(*(each_given(t, len(group)) for t in (A, B, seed))))
    biases = each_given(bias, len(group))
    for i, w in enumerate(group):
        first = (dy[i], x, s[i]) if backward else (x,)
        if backward and given(dy[i]) is None:
            found.append(None)
        elif many:
            needs = (args[-4][i], args[-3][i], args[-2], args[-1][i]) if backward else ()
            of = (*first, *w, *plan, *adapters[i], biases[i], *needs)
            found.append((op.replace("_group", ""), of))
        elif adapters[i][0] is None:
            of = (dy[i], *w) if backward else (x, *w, biases[i])
            found.append(("linear_4bit_dx" if backward else "linear_4bit", of))
        else:
            a, b, key = adapters[i]
            needs = (args[-4], *(need[i] for need in args[-3:])) if backward else ()
            of = (*first, *w, a, b, scaling[i], biases[i], dropout_p[i], key, *needs)
            found.append((op.replace("_group", ""), of))
    return found


# -- stacked experts -------------------------------------------------------------------------------

EXPERTS = 4


def is_transposed(case: Case) -> bool:
    return (case.M + case.N + case.R) % 2 == 1


def stack_case(case: Case) -> Case:
    """The problem whose weight ``[E*N, K]`` is the stack, or ``[E*K, N]`` if it is transposed."""
    N, K = (case.K, case.N) if is_transposed(case) else (case.N, case.K)
    return case._replace(N=EXPERTS * N, K=K)


def random_offsets(M: int) -> torch.Tensor:
    """Rows of each expert: some have none, one often has most, and some rows may have no expert."""
    cuts = [random.randint(0, M) for _ in range(EXPERTS)]
    if random.random() < 0.5:
        cuts[0] = M
    if random.random() < 0.5:
        cuts[1] = cuts[2]
    return torch.tensor(sorted(cuts), dtype=torch.int32)


def _stack(case: Case) -> tuple:
    return *random_weight(stack_case(case)).op_args(), random_offsets(case.M), is_transposed(case)


def _experts_bias(case: Case) -> torch.Tensor | None:
    return None if case.bias is None else random_tensor(EXPERTS, case.N, dtype=case.bias)


def _experts_lora(case: Case) -> tuple:
    return (
        random_tensor(EXPERTS, case.R, case.K, dtype=case.adapter, scale=case.K**-0.5),
        random_tensor(EXPERTS, case.N, case.R, dtype=case.adapter, scale=case.R**-0.5),
        case.scaling,
    )


def _grouped(op, case):
    x = random_tensor(case.M, case.K, dtype=case.dtype)
    return x, *_stack(case), _experts_bias(case)


def _grouped_lora(op, case):
    x = random_tensor(case.M, case.K, dtype=case.dtype)
    return x, *_stack(case), *_experts_lora(case), _experts_bias(case)


def _grouped_lora_backward(op, case):
    dy, x = (random_tensor(case.M, n, dtype=case.dtype) for n in (case.N, case.K))
    s = random_tensor(case.M, case.R, dtype=F32)
    return dy, x, s, *_stack(case), *_experts_lora(case), True, True, True


MAKE = {
    "quantize_4bit": _quantize,
    "double_quantize": _double_quantize,
    "dequantize_4bit": _dequantize,
    "linear_4bit": _linear,
    "linear_4bit_dx": _linear_dx,
    "lora_linear_4bit": _lora,
    "lora_linear_4bit_backward": _lora_backward,
    "lora_linear": _lora,
    "lora_linear_backward": _lora_backward,
    "multi_lora_": _multi,
    "multi_lora_backward": _multi_backward,
    "multi_lora_linear_4bit": _multi_linear,
    "multi_lora_linear_4bit_backward": _multi_linear_backward,
    "lora_linear_4bit_group": _lora_group,
    "lora_linear_4bit_group_backward": _lora_group_backward,
    "multi_lora_linear_4bit_group": _multi_group,
    "multi_lora_linear_4bit_group_backward": _multi_group_backward,
    "grouped_linear_4bit": _grouped,
    "grouped_lora_linear_4bit": _grouped_lora,
    "grouped_lora_linear_4bit_backward": _grouped_lora_backward,
}


def flatten(outputs) -> tuple[torch.Tensor, ...]:
    """The tensors of an operator's outputs, some of which are lists."""
    if isinstance(outputs, torch.Tensor):
        return (outputs,)
    return tuple(t for output in outputs for t in flatten(output))


def each_tensor(args, change: Callable[[torch.Tensor], torch.Tensor]):
    """Arguments of an operator with ``change`` applied to every tensor, those in lists too."""
    if isinstance(args, torch.Tensor):
        return change(args)
    if isinstance(args, list | tuple):
        return type(args)([each_tensor(a, change) for a in args])
    return args


def run(op: str, args: tuple) -> tuple[torch.Tensor, ...]:
    """The outputs of ``torch.ops.lowrank_kernels.<op>``; one that writes to its first argument gets a copy of it,
    which is then the first output."""
    function = getattr(ops, op)
    if not op.endswith("_"):
        return flatten(function(*args))
    first = args[0].detach().clone()
    return first, function(first, *args[1:])


def with_rows(args: tuple, case: Case, change: Callable[[torch.Tensor], torch.Tensor]) -> list:
    """``args``, where ``change`` was applied to what has a row for each of the case's M."""
    return each_tensor(list(args), lambda t: change(t) if t.shape[:1] == (case.M,) else t)


def call(op: str, args: tuple, case: Case) -> torch.Tensor:
    """The public function of a forward operator on its arguments; it draws its own dropout seed."""
    if op == "lora_linear":
        x, weight, A, B, scaling, bias, dropout_p, _ = args
        return lk.lora_linear(x, weight, A, B, scaling, bias, dropout_p)
    w = weight_of(args[1:10], case)
    if op == "linear_4bit":
        return lk.linear_4bit(args[0], w, args[10])
    A, B, scaling, bias, dropout_p, _ = args[10:]
    return lk.lora_linear_4bit(args[0], w, A, B, scaling, bias, dropout_p)


def make(op: str, case: Case) -> tuple:
    """Random arguments of ``torch.ops.lowrank_kernels.<op>`` for this problem."""
    return MAKE[op](op, case)
