"""What the suite measures: for each operator its cases, and who computes them.

A new operator is a function in OPS that gives, of the sizes, pairs of a case and its providers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import lowrank_kernels as lk
from lowrank_kernels.benchmark import multi_providers as many
from lowrank_kernels.benchmark import ops, providers
from lowrank_kernels.benchmark.case import MIX, Case
from lowrank_kernels.benchmark.harness import Provider
from lowrank_kernels.benchmark.ops import OURS
from lowrank_kernels.benchmark.providers import Calls

from . import peer_ggml, peer_openvino
from . import providers as others

Shapes = tuple[tuple[int, int], ...]
Entries = Iterator[tuple[Case, dict[str, Callable | Provider]]]

INT8 = f"{OURS}, int8 activations"
POPULARITIES = ("identical", "uniform", "zipf", "distinct")  # Punica's
RANK = 16


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Weights [N, K] and numbers of rows; ``many_*``: of many adapters in one batch."""

    device: str
    shapes: Shapes
    tokens: tuple[int, ...]
    training_tokens: tuple[int, ...]
    dtypes: tuple[str, ...]
    # Punica's shape (4096 -> 11008) and numbers of rows.
    many_shape: tuple[int, int] = (11008, 4096)
    many_tokens: tuple[int, ...] = (1, 4, 16, 64)

    def chosen(self, shapes: list[tuple[int, int]] | None, tokens: list[int] | None) -> Sizes:
        """The same with other shapes and rows, where they are given."""
        changes = {}
        if shapes:
            changes |= {"shapes": tuple(shapes), "many_shape": shapes[-1]}
        if tokens:
            names = ("tokens", "training_tokens", "many_tokens")
            changes |= dict.fromkeys(names, tuple(tokens))
        return dataclasses.replace(self, **changes)

    def cases(
        self, op: str, tokens: tuple[int, ...] | None = None, hot: bool = False, R: int = 0
    ) -> list[Case]:
        """``op`` at shapes x dtypes x tokens, cold, and on a CPU at the first shape in float32, ``hot``.

        Every dtype but the first has the first shape only. Shapes vary slowest: the weights of one are held at a time.
        """
        tokens = self.tokens if tokens is None else tokens
        cold = [
            Case(op, *shape, M, dtype, "cold", R, self.device)
            for shape, dtype, M in itertools.product(self.shapes, self.dtypes, tokens)
            if dtype == self.dtypes[0] or shape == self.shapes[0]
        ]
        hot = hot and self.device == "cpu"
        warm = [Case(op, *self.shapes[0], M, "float32", "hot", R) for M in tokens if hot]
        return sorted(cold + warm, key=lambda case: self.shapes.index((case.N, case.K)))


# Attention and MLP of a 7B model; on a GPU MLPs of an 8B and of a 70B model.
CPU_SHAPES, CPU_TOKENS = ((4096, 4096), (11008, 4096)), (1, 4, 16, 64, 512)
CUDA_SHAPES, CUDA_TOKENS = ((4096, 4096), (14336, 4096), (28672, 8192)), (1, 4, 16, 64, 256, 4096)
SIZES = {
    "cpu": Sizes("cpu", CPU_SHAPES, CPU_TOKENS, CPU_TOKENS, ("float32", "bfloat16")),
    "cuda": Sizes("cuda", CUDA_SHAPES, CUDA_TOKENS, (512, 4096), ("bfloat16",)),
}


# -- one adapter, or none --------------------------------------------------------------------------


def _base(name: str) -> dict[str, Callable | Provider]:
    """This library and the peers that the command line has for its operator ``name``."""
    return {OURS: ops.OPS[name].ours} | ops.OPS[name].peers


FLOAT32_PEERS = {
    peer_openvino.NAME: peer_openvino.PROVIDER,
    "bitsandbytes, training": others.linear_bitsandbytes_training,
    peer_ggml.NAME: peer_ggml.PROVIDER,
    INT8: Provider(others.linear_int8, lk.int8_activations),
}


def in_other_ways(case: Case, calls: Callable[[Case], Calls]) -> dict[str, Provider]:
    """``calls`` on a GPU by the Triton kernels; on a CPU, cold and in float32, by other instruction sets, and with
    equal bits in every batch. They take turns with the default, so that a few percent can be told from noise."""
    if case.device == "cuda":
        return {"triton": Provider(calls, functools.partial(lk.backends.use, "triton"))}
    if (case.dtype, case.cache) != ("float32", "cold"):
        return {}
    found = {f"{OURS}, batch-invariant": Provider(calls, lk.batch_invariant)}
    for isa in lk.backends.isas():
        if isa not in ("scalar", lk.backends.isa()):  # a call of the scalar kernels takes seconds
            found[f"{OURS}, {isa}"] = Provider(calls, functools.partial(lk.backends.use_isa, isa))
    return found


def linear(sizes: Sizes) -> Entries:
    for case in sizes.cases("linear_4bit", hot=True):
        peers = FLOAT32_PEERS if case.dtype == "float32" else {}
        yield case, _base("linear") | peers | in_other_ways(case, providers.linear_lowrank)


def dx(sizes: Sizes) -> Entries:
    for case in sizes.cases("linear_4bit_dx", hot=True):
        yield case, _base("dx") | in_other_ways(case, providers.dx_lowrank)


def lora(sizes: Sizes) -> Entries:
    cases = sizes.cases("lora_linear_4bit", R=RANK)
    cases += sizes.cases("lora_linear_4bit_fwd_bwd", sizes.training_tokens, R=RANK)
    for case in cases:
        triton = in_other_ways(case, providers.lora_lowrank) if case.device == "cuda" else {}
        yield case, _base("lora") | triton


def quantize(sizes: Sizes) -> Entries:
    to = {OURS: others.quantize_lowrank, "bitsandbytes": others.quantize_bitsandbytes}
    back = {OURS: others.dequantize_lowrank, "bitsandbytes": others.dequantize_bitsandbytes}
    for op, of_op in (("quantize_4bit", to), ("dequantize_4bit", back)):
        for case in sizes.cases(op, tokens=(0,)):
            yield case, of_op


# -- many adapters in one batch --------------------------------------------------------------------

ADDED = {
    OURS: many.many_lowrank,
    "torch loop": others.many_loop,
    "gather + bmm": others.many_gather_bmm,
}
LINEAR = {
    OURS: many.many_linear_lowrank,
    "linear_4bit, multi_lora_": others.many_linear_separate,
    "linear_4bit, torch loop": many.many_linear_loop,
}
IN_PLACE = {"torch loop, addmm_": others.many_loop_in_place}


def multi_lora(sizes: Sizes) -> Entries:
    """Punica's grid, and at the first shape what a server does."""

    def case(op: str, M: int, popularity: str, dtype: str = sizes.dtypes[0], mixed=False) -> Case:
        R, device = max(MIX) if mixed else RANK, sizes.device
        return Case(op, *sizes.shapes[0], M, dtype, "cold", R, device, popularity, mixed)

    shape = dict(zip("NK", sizes.many_shape))
    for popularity, M in itertools.product(POPULARITIES, sizes.many_tokens):
        if M > 1 or popularity == "identical":  # of one row, all are the same
            yield dataclasses.replace(case("multi_lora_", M, popularity), **shape), ADDED
    for batch in ((4, "distinct"), (64, "distinct"), (512, "4")):
        yield case("multi_lora_linear_4bit", *batch), LINEAR
    yield case("multi_lora_", 512, "4"), ADDED | IN_PLACE
    for dtype, mixed in itertools.product(sizes.dtypes, (False, True)):
        yield case("multi_lora_", 64, "distinct", dtype, mixed), ADDED | IN_PLACE


OPS = {
    "linear_4bit": linear,
    "linear_4bit_dx": dx,
    "lora_linear_4bit": lora,
    "multi_lora": multi_lora,
    "quantize": quantize,
}


def entries(
    sizes: Sizes, names: list[str] | None = None, only: str = "", quick: bool = False
) -> list[tuple[Case, dict[str, Provider]]]:
    """Cases of the operators ``names`` whose id has ``only`` in it, a shape's together; quick: of the first shape."""
    found: dict[Case, dict[str, Provider]] = {}
    for name in names or OPS:
        for case, of_case in OPS[name](sizes):
            if only in case.id and (not quick or sizes.shapes[0] == (case.N, case.K)):
                found.setdefault(case, of_case)
    for case, of_case in found.items():
        found[case] = {n: p if isinstance(p, Provider) else Provider(p) for n, p in of_case.items()}
    shapes = [*sizes.shapes, sizes.many_shape]
    return sorted(found.items(), key=lambda entry: shapes.index((entry[0].N, entry[0].K)))
