"""Cases at the edges of the CPU kernels, made from the constants that the kernels are compiled with.

``constants(isa)`` reads them from csrc/cpu, so a kernel with another tile gets other cases. ``linear(isa)`` has a
case for every size at which a kernel of the linear operators does something else (that size, one less, one more), and
one for every region in which two such sizes meet; ``many_adapters(isa)`` has the same for a batch of many adapters, and
``weights(isa)`` for the operators on a weight alone.
"""

from __future__ import annotations

import functools
import math
import pathlib
import random
import re
from collections.abc import Iterable

from cases import BF16, F16, F32, Case
from lowrank_kernels.schema import NESTED_BLOCKSIZE

CSRC = pathlib.Path(__file__).parents[1] / "csrc" / "cpu"
BUDGET = 20_000_000  # multiplications of a case, which scalar code does in some 20 ms


def vocabulary(isa: str) -> list[pathlib.Path]:
    """The headers of csrc/cpu/simd that a unit of csrc/cpu/isa includes, those that others include first."""

    def included(source: pathlib.Path) -> list[pathlib.Path]:
        names = re.findall(r'^#include "cpu/(simd/\w+\.h)"', source.read_text(), re.MULTILINE)
        return [file for name in names for file in (*included(CSRC / name), CSRC / name)]

    return included(CSRC / "isa" / f"{isa}.cpp")


def multiplies_pairs(isa: str) -> bool:
    """Whether bfloat16 activations have kernels of their own there."""
    return any("#define LK_DOT2" in header.read_text() for header in vocabulary(isa))


@functools.cache
def constants(isa: str) -> dict[str, int]:
    """Name -> value of the integers that the vocabulary of csrc/cpu/isa/<isa>.cpp, csrc/cpu/kernels and csrc/cpu/<isa>
    define."""
    sources = [*vocabulary(isa), *sorted(CSRC.glob("kernels/*.inl"))]
    sources += sorted(CSRC.glob(f"{isa}/*.inl"))
    expressions: dict[str, str] = {}
    for source in sources:
        text = re.sub(r"//[^\n]*", "", source.read_text(encoding="utf-8"))
        for declaration in re.findall(r"^ *constexpr int(?:64_t)? ([^;{]+);", text, re.MULTILINE):
            expressions |= dict(re.findall(r"(\w+) =\s+([^,]+)", declaration))
    found: dict[str, int] = {}
    for _ in expressions:  # each round has at least one whose names are known
        for name, expression in expressions.items():
            choice = re.fullmatch(r"(.*?)\(?(\w+ [<>]=? \w+) \? (\w+) : (\w+)\)?", expression)
            python = "{0}({2} if {1} else {3})".format(*choice.groups()) if choice else expression
            try:
                found[name] = eval(python, {"INT64_MAX": 2**63 - 1}, found)
            except (NameError, SyntaxError):  # not yet, or made of a template's arguments
                continue
    return found


def around(*values: int, step: int = 1) -> list[int]:
    """Each value and its neighbours, in order."""
    return sorted({v + d for v in values for d in (-step, 0, step) if v + d > 0})


class Turns:
    """Values in turn, shuffled, each as often as the others, as far as a condition lets it; if none fits, the first."""

    def __init__(self, values: Iterable, seed: int = 0):
        self.values = list(values)
        self.first = self.values[0]
        random.Random(seed).shuffle(self.values)

    def take(self, fits=lambda value: True):
        value = next(filter(fits, self.values), self.first)
        self.values.remove(value)
        self.values.append(value)
        return value


def _sizes(isa: str) -> tuple[list[int], list[int], list[int]]:
    """(M, N, K) at and around which a kernel of a linear operator changes; K in whole blocks of 32."""
    c = constants(isa)
    rows = around(
        c["kMaxGemv"],
        c["kMicroRows"],
        c["kSkinnyRows"],
        c["kMaxSkinny"],
        c["kSkinnyWide"],
        c["kWhole"],
    )
    rows += [c["kRows"], c["kRows"] + 1]
    if multiplies_pairs(isa):
        rows += around(c["kPairWide"], c["kMaxPairs"], c["kMaxSkinnyPairs"])
    if isa == "amx":
        rows += around(c["kAmxForward"], c["kAmxDx"], 2 * c["kAmxRows"])
        rows += around(c["kAmxForwardPairs"], c["kAmxDxPairs"])
    strip = c["kStripsAtOnce"] * c["kStripWidth"]
    outputs = around(c["kLanes"], c["kMicroColumns"], c["kStripWidth"], c["kDepth"], strip)
    depths = around(c["kChunk"], c["kDepth"], c["kStage"], c["kStripWidth"], strip, step=32)
    return sorted({*rows}), outputs, depths


def _case(kind: dict[str, Turns], M: int, N: int, K: int) -> Case:
    """With a block size that fits K, if any does, and the next of everything that is no size."""
    blocksize = kind["blocksize"].take(lambda size: K % size == 0 or K % 32)
    return Case(
        M,
        N,
        K,
        blocksize=blocksize,
        **{n: turns.take() for n, turns in kind.items() if n != "blocksize"},
    )


def _kinds(isa: str) -> dict[str, Turns]:
    """What a case has beside its sizes."""
    pairs = multiplies_pairs(isa)
    return {
        "blocksize": Turns((32, 64, 128, 256, 512, 1024)),
        "quant_type": Turns(("nf4", "fp4", "nf4")),
        "double_quant": Turns((True, False)),
        "dtype": Turns((BF16, F32, BF16, F16, BF16) if pairs else (F32, BF16, F32, F16, F32)),
        "bias": Turns((None, F32, BF16, None, F16, None, None)),
        "R": Turns((8, 1, 16, 5, 64, 3, 20, 33, 12, 17, 40)),
        "adapter": Turns((F32, BF16, F32, F16, F32, BF16, F32)),
        "dropout_p": Turns((0.0, 0.25, 0.0, 0.0)),
    }


def regions(isa: str) -> dict[str, dict[str, int | bool]]:
    """Name -> sizes, and what else matters, of problems in which two edges meet."""
    c = constants(isa)
    gemv, skinny, depth, width = c["kMaxGemv"], c["kMaxSkinny"], c["kDepth"], c["kStripWidth"]
    piece, stage, at_once = c["kStripsAtOnce"] * width, c["kStage"], c["kStripsAtOnce"]
    nested = {"blocksize": 32, "double_quant": True}
    found = {
        "gemv: a second chunk in part": dict(M=gemv, N=9, K=c["kChunk"] + 32),
        "gemv: many scales in a row": dict(M=3, N=5, K=32 * (2 * c["kLanes"] + 1), blocksize=32),
        "gemv: the next nested blocks": dict(M=2, N=NESTED_BLOCKSIZE // 8 + 3, K=320) | nested,
        "gemv: two pieces of dx": dict(M=1, N=33, K=2 * piece + 32),
        "dx: a second panel": dict(M=gemv + 1, N=depth + 1, K=32),
        "dx: a second panel and strip": dict(M=gemv + 4, N=2 * depth + 3, K=width + 32),
        "dx: a second panel and piece": dict(M=gemv + 1, N=depth + 5, K=piece + width + 64),
        "dx: a second panel, many rows": dict(M=c["kWhole"] + 1, N=depth + 7, K=width + 64),
        # Two threads have an odd number of strips each, and a block is two strips.
        "dx: pieces begin and end within blocks": dict(
            M=gemv + 1, N=9, K=2 * (at_once + 1) * width, blocksize=2 * width
        ),
        "skinny: a second stage and strip": dict(M=gemv + 1, N=width + 3, K=stage + 32),
        "skinny: the next nested blocks": dict(M=gemv + 2, N=width + 1, K=depth + 64) | nested,
        "gemm: a second panel and piece": dict(M=skinny + 1, N=piece + 5, K=depth + 32),
        "gemm: the next nested blocks": dict(M=skinny + 2, N=width + 1, K=depth + 64) | nested,
        "both: a second chunk of rows": dict(
            M=c["kRows"] + 3, N=c["kMicroColumns"] + 1, K=depth + 32
        ),
        "blocks cross rows: a second panel": dict(M=c["kWhole"] + 1, N=width + 1, K=depth + 5),
        "blocks cross rows: a second piece": dict(M=gemv - 1, N=depth + 1, K=piece + 3),
    }
    if isa == "amx":
        rows = c["kAmxDx"] + c["kAmxRows"] + 1
        found |= {
            "amx: a second panel of both": dict(M=rows, N=depth + 9, K=depth + 32),
            "amx: a second piece of dx": dict(M=rows, N=33, K=piece + 64),
            "amx: a second piece of y": dict(M=c["kAmxForward"], N=piece + 33, K=96),
            "amx: pairs, a second panel of both": dict(
                M=2 * c["kAmxRows"] + 3, N=depth + 9, K=depth + 32, dtype=BF16
            ),
            "amx: pairs, a second piece of dx": dict(
                M=c["kAmxDxPairs"], N=35, K=piece + 64, dtype=BF16
            ),
            "amx: pairs, a second piece of y": dict(
                M=c["kAmxForwardPairs"], N=piece + 33, K=96, blocksize=32, dtype=BF16
            ),
        }
    return found


@functools.cache
def linear(isa: str) -> list[Case]:
    """About 60 cases for the operators of one weight."""
    sizes = _sizes(isa)
    kinds, turns = _kinds(isa), [Turns(values, seed) for seed, values in enumerate(sizes)]
    found = []
    for i, values in enumerate(sizes):
        for value in values:
            shape = [0, 0, 0]
            shape[i] = value
            for j in (1, 2, 0):  # the long ones first: they leave fewer rows
                if j != i:
                    room = BUDGET // math.prod(filter(None, shape))
                    room //= 8 if shape.count(0) == 2 else 1  # another side comes after this one
                    shape[j] = turns[j].take(lambda v, room=room: v <= room)
            found.append(_case(kinds, *shape))
    for region in regions(isa).values():
        case = _case(kinds, region["M"], region["N"], region["K"])
        found.append(case._replace(**region))
    return found


@functools.cache
def many_adapters(isa: str) -> list[Case]:
    """Some 25 cases for the operators of a batch with many adapters: ranks, columns, rows of a plan's tile."""
    c = constants(isa)
    ranks = around(c["kDotRanks"], c["kRanksAtOnce"]) + [2 * c["kRanksAtOnce"] + 1]
    columns = around(c["kDotDepth"], c["kStripWidth"], step=32)
    rows = [
        c["kDotRows"] + 1,
        c["kMaxGemv"],
        4 * c["kMicroRows"] + 1,
        *around(16, c["kMaxTileRows"]),
    ]
    kinds, turns = _kinds(isa), [Turns(rows), Turns(columns, 1), Turns(columns, 2), Turns(ranks)]
    count = 2 * max(map(len, (ranks, columns, rows)))
    sizes = [[turn.take() for turn in turns] for _ in range(count)]
    found = [_case(kinds, M, N, K)._replace(R=R) for M, N, K, R in sizes]
    for shape in (
        (5, c["kDepth"] + 1, c["kStripWidth"] + 32),
        (c["kMaxGemv"], 33, c["kDotDepth"] + 32),
    ):
        found.append(_case(kinds, *shape))
    return found


@functools.cache
def weights(isa: str) -> list[Case]:
    """Cases for the operators on the weight alone: spans that a thread takes at a time, blocks of nested scales."""
    span = constants(isa)["kSpan"]
    kinds = _kinds(isa)
    shapes = [(1, size) for size in around(span, 2 * span)]
    shapes += [(rows, 32) for rows in around(NESTED_BLOCKSIZE, 2 * NESTED_BLOCKSIZE)]
    shapes += [(3, span // 2 + 16), (span // 32 + 1, 33), (2, 48)]
    found = [_case(kinds, 1, N, K) for N, K in shapes]
    return [case._replace(double_quant=True) if case.K == 32 else case for case in found]
