"""What is timed: one :class:`Case`, and the flops and bytes that its operator cannot do without."""

from __future__ import annotations

import itertools
import os

from lowrank_kernels.benchmark.case import Case

# What `choose` sets, before the modules of the suite are imported; until then, the CPU's.
DEVICE = "cpu"
SHAPES = ((4096, 4096), (11008, 4096))  # [N, K]: attention and MLP of a 7B model
TOKENS = (1, 4, 16, 64, 512)
TRAINING_TOKENS = TOKENS
DTYPES = ("float32", "bfloat16")
RANK = 16
# Of many adapters in one batch: Punica's shape (4096 -> 11008) and numbers of rows, and the ranks
# of S-LoRA's mixed settings.
MANY_SHAPE = (11008, 4096)
MANY_TOKENS = (1, 4, 16, 64)


def growth_shapes(memory_bytes: int) -> tuple[tuple[int, int], ...]:
    """Squares whose float32 weight is at most a sixteenth of the memory: copies of it take turns."""
    sizes = (512, 1024, 2048, 4096, 8192, 16384)
    return tuple((size, size) for size in sizes if 16 * 4 * size * size <= memory_bytes)


# Of the growth of time with N·K.
GROWTH_SHAPES = growth_shapes(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
GROWTH_TOKENS = (1, 16, 512)


def choose(
    device: str, shapes: list[tuple[int, int]] | None = None, tokens: list[int] | None = None
) -> None:
    """Makes :func:`cases` list the cases of ``device``; other shapes and M where they are given."""
    global DEVICE, SHAPES, TOKENS, TRAINING_TOKENS, DTYPES, MANY_SHAPE, MANY_TOKENS
    global GROWTH_SHAPES, GROWTH_TOKENS
    if device == "cuda":
        DEVICE = device
        SHAPES = ((4096, 4096), (14336, 4096), (28672, 8192))  # MLPs of an 8B and a 70B model
        TOKENS = (1, 4, 16, 64, 256, 4096)
        TRAINING_TOKENS = (512, 4096)
        DTYPES = ("bfloat16",)
        GROWTH_SHAPES = ()
    SHAPES = tuple(shapes or SHAPES)
    TRAINING_TOKENS = tuple(tokens or TRAINING_TOKENS)
    TOKENS = tuple(tokens or TOKENS)
    MANY_SHAPE = SHAPES[-1] if shapes else MANY_SHAPE
    MANY_TOKENS = tuple(tokens or MANY_TOKENS)
    GROWTH_SHAPES = SHAPES if shapes and GROWTH_SHAPES else GROWTH_SHAPES
    GROWTH_TOKENS = tuple(tokens or GROWTH_TOKENS)


def cases(
    op: str, tokens: tuple[int, ...] | None = None, hot: tuple[int, ...] = (), R: int = 0
) -> list[Case]:
    """``op`` at SHAPES x tokens x dtypes, cold, and on a CPU at the first shape in float32, hot.

    On a CPU the second dtype has the first shape only, too. Shapes vary slowest: the harness holds
    the weights of one shape at a time.
    """
    cold = [
        Case(op, *shape, M, dtype, "cold", R, DEVICE)
        for shape, dtype, M in itertools.product(
            SHAPES, DTYPES, TOKENS if tokens is None else tokens
        )
        if dtype == DTYPES[0] or shape == SHAPES[0]
    ]
    warm = [Case(op, *SHAPES[0], M, "float32", "hot", R) for M in hot if DEVICE == "cpu"]
    return sorted(cold + warm, key=lambda case: SHAPES.index((case.N, case.K)))
