"""The arguments of the operators: the groups that travel together, and what a traced call may not get wrong.

Three groups of arguments run through many operators, flat in a schema and as a named tuple wherever Python reads
them (:func:`flat`): a 4-bit weight (:class:`WeightArgs`, made by :meth:`Weight4bit.op_args`), the plan of a batch
with many adapters (:class:`PlanArgs`, made by :class:`multi_lora.Plan`), and the pages that hold the adapters of one
module (:class:`PagesArgs`, made by :class:`multi_lora.ModulePages`).
"""

from __future__ import annotations

import functools
import inspect
import operator
import typing
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
TILE_ROWS = (16, 32, 64, 128)
RANK_STEP = 8  # S is as many columns wide as whole steps of ranks hold max_rank
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def s_width(plan: PlanArgs) -> int:
    """How many columns S of many adapters has."""
    return ceil_div(plan.max_rank, RANK_STEP) * RANK_STEP


# -- groups of arguments -------------------------------------------------------------------------------------


class WeightArgs(NamedTuple):
    """A 4-bit weight ``[N, K]``; docs/format.md draws it. ``blocks = ceil(N*K/blocksize)``.

    =================  ========================================================================================
    ``packed``         contiguous, ``ceil(N*K/2)`` bytes of any dtype; element ``2i`` is the high nibble of byte i
    ``absmax``         ``[blocks]``; float32, or uint8 when double-quantized
    ``code``           float32 ``[16]``: the value of each nibble
    ``nested_absmax``  float32 ``[ceil(blocks/256)]`` or None
    ``nested_code``    float32 ``[256]`` or None
    ``nested_offset``  float32, one element, or None
    =================  ========================================================================================
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    nested_absmax: torch.Tensor | None
    nested_code: torch.Tensor | None
    nested_offset: torch.Tensor | None
    N: int
    K: int
    blocksize: int

    def expected(self) -> dict[str, tuple[torch.dtype, int]]:
        """Dtype and number of elements of each tensor, from N, K, blocksize and whether there is a nested_absmax.

        ``packed`` may have any dtype: its own, as many as hold ``ceil(N*K/2)`` bytes.
        """
        numel, double_quant = self.N * self.K, self.nested_absmax is not None
        blocks, packed, float32 = ceil_div(numel, self.blocksize), self.packed.dtype, torch.float32
        expected = {
            "packed": (packed, ceil_div(ceil_div(numel, 2), packed.itemsize)),
            "absmax": (torch.uint8 if double_quant else float32, blocks),
            "code": (float32, 16),
        }
        if double_quant:
            expected["nested_absmax"] = (float32, ceil_div(blocks, NESTED_BLOCKSIZE))
            expected["nested_code"] = (float32, 256)
            expected["nested_offset"] = (float32, 1)
        return expected


class PlanArgs(NamedTuple):
    """Which row of a batch has which adapter, the same for every module.

    ===============  ==========================================================================================
    ``tiles``        int32 ``[tiles, 4]``: slot, row0, rows, page0; up to ``tile_rows`` rows that share an
                     adapter, ``rows[row0 : row0 + rows]``, with pages ``page_ids[page0:]``. Tiles of one slot
                     are adjacent
    ``page_ids``     int32: the pages of each adapter of the batch
    ``tile_of_row``  int32 ``[M]``: the tile of each row; -1: it has no adapter
    ``rows``         int32: row numbers by slot, ascending within a slot
    ``tile_rows``    16, 32, 64 or 128
    ``max_rank``     the largest rank of any adapter of the plan in any module
    ===============  ==========================================================================================
    """

    tiles: torch.Tensor
    page_ids: torch.Tensor
    tile_of_row: torch.Tensor
    rows: torch.Tensor
    tile_rows: int
    max_rank: int


class PagesArgs(NamedTuple):
    """The adapters of one module. Rank r of an adapter is row ``r % page_rank`` of its page ``r // page_rank``.

    =============  ============================================================================================
    ``A_pages``    floating ``[pages, page_rank, K]``, contiguous
    ``B_pages``    ``[pages, page_rank, N]`` in the same dtype, contiguous: B transposed
    ``ranks``      int32 ``[slots]``; 0: the adapter does not cover this module
    ``scalings``   float32 ``[slots]``
    ``dropout_p``  float64 ``[slots]``; in force only where there is a ``seed``
    ``seed``       int64, one element, or None
    =============  ============================================================================================
    """

    A_pages: torch.Tensor
    B_pages: torch.Tensor
    ranks: torch.Tensor
    scalings: torch.Tensor
    dropout_p: torch.Tensor
    seed: torch.Tensor | None


GROUPS = {group.__name__: group for group in (WeightArgs, PlanArgs, PagesArgs)}
WEIGHT_TENSORS, WEIGHT_SIZES, PAGES_TENSORS = 6, 3, 5


def given(t: torch.Tensor) -> torch.Tensor | None:
    """A tensor in a list of a group; None where it has shape [0], which stands for None.

    torch resolves views that negate in lists of tensors, and in lists of optional ones does not.
    """
    return None if t.dim() == 1 and t.shape[0] == 0 else t


def each_given(tensors: Sequence[torch.Tensor], count: int) -> list[torch.Tensor | None]:
    """The entries of a list of a group, which is empty where no weight has one."""
    return [given(t) for t in tensors] if len(tensors) else [None] * count


def each_weight(weights: Sequence[torch.Tensor], dims: Sequence[int]) -> list[WeightArgs]:
    """The weights of a group: of each there are six entries in ``weights``, and N, K and blocksize in ``dims``."""
    found = []
    for i in range(len(dims) // WEIGHT_SIZES):
        *tensors, nested_absmax, nested_code, nested_offset = weights[WEIGHT_TENSORS * i :][
            :WEIGHT_TENSORS
        ]
        nested = nested_absmax, nested_code, nested_offset
        if given(nested_code) is None:  # nested_absmax has that shape where there is no block
            nested = None, None, None
        found.append(WeightArgs(*tensors, *nested, *dims[WEIGHT_SIZES * i :][:WEIGHT_SIZES]))
    return found


def each_pages(pages: Sequence[torch.Tensor], seeds: Sequence[torch.Tensor]) -> list[PagesArgs]:
    """The pages of a group: of each weight there are five entries in ``pages``, and one in ``seeds`` if not empty."""
    t = PAGES_TENSORS
    of = each_given(seeds, len(pages) // t)
    return [PagesArgs(*pages[t * i : t * i + t], seed) for i, seed in enumerate(of)]


def flat(function: Callable) -> Callable:
    """``function`` with the flat arguments of its operator's schema.

    A parameter of ``function`` that is annotated with one of the groups above takes as many arguments as the group
    has, as a named tuple; every other parameter takes one.
    """
    parameters = inspect.signature(function).parameters.values()
    groups = [GROUPS.get(parameter.annotation) for parameter in parameters]

    @functools.wraps(function)
    def call(*args):
        grouped, at = [], 0
        for group in groups:
            end = at + (1 if group is None else len(group._fields))
            grouped += args[at:end] if group is None else [group(*args[at:end])]
            at = end
        return function(*grouped, *args[at:])

    call.argument_names = tuple(
        name
        for parameter, group in zip(parameters, groups)
        for name in ((parameter.name,) if group is None else group._fields)
    )
    return call


def in_schema(group: type) -> str:
    """The arguments of a group as a schema spells them."""
    kinds = {torch.Tensor: "Tensor", torch.Tensor | None: "Tensor?", int: "int"}
    hints = typing.get_type_hints(group)
    return ", ".join(f"{kinds[hints[name]]} {name}" for name in group._fields)


# -- checks while a program is traced ------------------------------------------------------------------------
# What the kernels refuse fails when a program is traced or runs on meta tensors too. Sizes may be symbols, so a
# condition is never asked for its truth here: torch._check does that, now or when the program runs. Strides are
# left to the kernels.


def expect(condition: bool | torch.SymBool, name: str, words: str, *sizes: object) -> None:
    torch._check(condition, lambda: f"{name}: expected {words.format(*sizes)}")


def expect_dtype(name: str, t: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    words = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    expect(t.dtype in dtypes, name, words + ", got {}", t.dtype)


def expect_shape(
    name: str, t: torch.Tensor, *shape: int, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
) -> None:
    expect_dtype(name, t, dtypes)
    expect(t.dim() == len(shape), name, "shape {}, got {}", shape, tuple(t.shape))
    for size, expected in zip(t.shape, shape):
        expect(size == expected, name, "shape {}, got {}", shape, tuple(t.shape))


def expect_numel(name: str, t: torch.Tensor, dtype: torch.dtype, numel: int) -> None:
    expect_dtype(name, t, (dtype,))
    expect(t.numel() == numel, name, "{} elements, got shape {}", numel, tuple(t.shape))


def expect_matrix(name: str, t: torch.Tensor) -> tuple[int, int]:
    expect_dtype(name, t, FLOAT_DTYPES)
    expect(t.dim() == 2, name, "a matrix, got shape {}", tuple(t.shape))
    return t.shape


def expect_one_of(name: str, value: int, values: tuple[int, ...]) -> None:
    among = functools.reduce(operator.or_, [value == v for v in values])
    expect(among, name, "one of {}, got {}", values, value)


def first_tensor(args: Sequence) -> torch.Tensor:
    """The first tensor among arguments, of which some are lists."""
    for value in args:
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, torch.Tensor):
                return item
    raise RuntimeError("expected a tensor among the arguments, got none")


def expect_one_device(names: tuple[str, ...], args: tuple) -> None:
    device = first_tensor(args).device
    for name, value in zip(names, args):
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, torch.Tensor):
                expect(item.device == device, name, "a tensor on {}, got {}", device, item.device)


# ``at`` is "" or, in a list, the place of what is checked: "[1]".


def expect_weight(w: WeightArgs, at: str = "") -> None:
    of = f"weights{at}." if at else ""
    expect_one_of(f"{of}blocksize", w.blocksize, BLOCKSIZES)
    expect(w.N >= 0, f"{of}N", "a size, got {}", w.N)
    expect(w.K >= 0, f"{of}K", "a size, got {}", w.K)
    for name, (dtype, numel) in w.expected().items():
        value = getattr(w, name)
        expect(value is not None, f"{of}{name}", "a tensor like nested_absmax, got None")
        expect_numel(f"{of}{name}", value, dtype, numel)


def expect_bias(bias: torch.Tensor | None, N: int, at: str = "") -> None:
    if bias is not None:
        expect_shape(f"bias{at}", bias, N)


def expect_seed(seed: torch.Tensor | None, at: str = "") -> None:
    if seed is not None:
        expect_numel(f"seed{at}", seed, torch.int64, 1)


def expect_lora(A, B, N: int, K: int, dropout_p: float, seed, at: str = "") -> None:
    R, _ = expect_matrix(f"A{at}", A)
    expect_shape(f"A{at}", A, R, K)
    expect_shape(f"B{at}", B, N, R)
    expect(dropout_p >= 0.0, f"dropout_p{at}", "0 <= p < 1, got {}", dropout_p)
    expect(dropout_p < 1.0, f"dropout_p{at}", "0 <= p < 1, got {}", dropout_p)
    if seed is None:
        words = "a tensor for dropout_p = {}, got None"
        expect(dropout_p == 0.0, f"seed{at}", words, dropout_p)
    expect_seed(seed, at)


def expect_plan(plan: PlanArgs, M: int) -> None:
    expect_one_of("tile_rows", plan.tile_rows, TILE_ROWS)
    expect(plan.max_rank >= 0, "max_rank", "a rank, got {}", plan.max_rank)
    expect(plan.max_rank < 2**24, "max_rank", "a rank, got {}", plan.max_rank)
    for name in ("tiles", "page_ids", "rows"):
        expect_dtype(name, getattr(plan, name), (torch.int32,))
    tiles = plan.tiles.numel()
    expect(tiles % 4 == 0, "tiles", "shape [tiles, 4], got {}", tuple(plan.tiles.shape))
    expect_numel("tile_of_row", plan.tile_of_row, torch.int32, M)


def expect_pages(pages: PagesArgs, N: int, K: int, at: str = "") -> None:
    A, B, ranks, scalings, dropout_p, seed = pages
    of = f"pages{at}." if at else ""
    expect(A.dim() == 3, f"{of}A_pages", "[pages, page_rank, K], got {}", tuple(A.shape))
    count, page_rank, _ = A.shape
    expect(page_rank > 0, f"{of}page_rank", "a multiple of {}, got {}", RANK_STEP, page_rank)
    expect(page_rank % RANK_STEP == 0, f"{of}page_rank", "a multiple of {}, got {}", RANK_STEP, page_rank)  # fmt: skip
    expect_shape(f"{of}A_pages", A, count, page_rank, K)
    expect_shape(f"{of}B_pages", B, count, page_rank, N, dtypes=(A.dtype,))
    slots = ranks.numel()
    expect_numel(f"{of}ranks", ranks, torch.int32, slots)
    expect_numel(f"{of}scalings", scalings, torch.float32, slots)
    expect_numel(f"{of}dropout_p", dropout_p, torch.float64, slots)
    expect_seed(seed, at)


def expect_length(name: str, values: Sequence, length: int, or_none: bool = False) -> None:
    if not (or_none and len(values) == 0):
        expect(len(values) == length, name, "{} entries, got {}", length, len(values))


def expect_group(weights: Sequence[torch.Tensor], dims: Sequence[int]) -> list[WeightArgs]:
    """The weights of a group, checked: one or more that have one K."""
    count = len(dims) // WEIGHT_SIZES
    words = "N, K and blocksize of one weight or more, got {} integers"
    expect(count > 0 and len(dims) % WEIGHT_SIZES == 0, "dims", words, len(dims))
    expect_length("weights", weights, WEIGHT_TENSORS * count)
    found = each_weight(weights, dims)
    for i, w in enumerate(found):
        expect_weight(w, f"[{i}]")
        expect(w.K == found[0].K, "dims", "one K, got {} and {}", found[0].K, w.K)
    return found
