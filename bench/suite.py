"""What the suite measures: for each operator its cases, and who computes them.

A new operator is a function in OPS that gives, of the sizes, pairs of a case and its providers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import torch

import lowrank_kernels as lk
from lowrank_kernels.benchmark import experts, models, ops, providers
from lowrank_kernels.benchmark import multi_providers as many
from lowrank_kernels.benchmark.case import MIX, Case, ModelCase
from lowrank_kernels.benchmark.harness import Provider, with_medium
from lowrank_kernels.benchmark.ops import OURS
from lowrank_kernels.benchmark.providers import Calls, Unavailable
from lowrank_kernels.cli import UserError
from lowrank_kernels.cli.models import loader

from . import peer_ggml, peer_int4, peer_openvino
from . import providers as others

Shapes = tuple[tuple[int, int], ...]
Entries = Iterator[tuple[Case | ModelCase, dict[str, Callable | Provider]]]

INT8, MEDIUM = f"{OURS}, int8 activations", f"{OURS}, medium"
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
    models: tuple[str, ...] = ()
    # Tokens that the experts of a layer get, and in training.
    experts_tokens: tuple[int, ...] = (1, 16, 512)
    experts_training_tokens: tuple[int, ...] = (512,)

    def chosen(
        self,
        shapes: list[tuple[int, int]] | None,
        tokens: list[int] | None = None,
        models: list[str] | None = None,
    ) -> Sizes:
        """The same with other shapes, rows and models, where they are given; models that are not have neither."""
        changes = {}
        if models or shapes or tokens:
            changes["models"] = tuple(models or ())
        if shapes:
            changes |= {"shapes": tuple(shapes), "many_shape": shapes[-1]}
        if tokens:
            names = (
                "tokens",
                "training_tokens",
                "many_tokens",
                "experts_tokens",
                "experts_training_tokens",
            )
            changes |= dict.fromkeys(names, tuple(tokens))
        if shapes:  # experts have shapes of their own
            changes |= {"experts_tokens": (), "experts_training_tokens": ()}
        return dataclasses.replace(self, **changes)

    def cases(self, op: str, tokens: tuple[int, ...] | None = None, R: int = 0) -> list[Case]:
        """``op`` at shapes x dtypes x tokens, cold. But for linear_4bit, every dtype but the first has the first shape
        only. Shapes vary slowest: the weights of one are held at a time."""
        tokens = self.tokens if tokens is None else tokens
        return [
            Case(op, *shape, M, dtype, "cold", R, self.device)
            for shape, dtype, M in itertools.product(self.shapes, self.dtypes, tokens)
            if op == "linear_4bit" or dtype == self.dtypes[0] or shape == self.shapes[0]
        ]


MODELS = ("tinyllama-4", "smollm2")
# Attention and MLP of a 7B model; on a GPU MLPs of an 8B and of a 70B model.
CPU_SHAPES, CPU_TOKENS = ((4096, 4096), (11008, 4096)), (1, 4, 16, 64, 512)
CUDA_SHAPES, CUDA_TOKENS = ((4096, 4096), (14336, 4096), (28672, 8192)), (1, 4, 16, 64, 256, 4096)
SIZES = {
    "cpu": Sizes("cpu", CPU_SHAPES, CPU_TOKENS, CPU_TOKENS, ("float32", "bfloat16"), models=MODELS),
    "cuda": Sizes("cuda", CUDA_SHAPES, CUDA_TOKENS, (512, 4096), ("bfloat16",)),
}


# -- one adapter, or none --------------------------------------------------------------------------


def _base(name: str) -> dict[str, Callable | Provider]:
    """This library and the peers that the command line has for its operator ``name``."""
    return {OURS: ops.OPS[name].ours} | ops.OPS[name].peers


# These providers exist for linear_4bit alone: some for float32 activations, some for bfloat16 ones.
LINEAR_PEERS = {
    "float32": {
        INT8: Provider(others.linear_int8, lk.int8_activations),
        **peer_openvino.PROVIDERS,
        **peer_int4.FLOAT32,
        peer_ggml.NAME: peer_ggml.PROVIDER,
    },
    "bfloat16": peer_int4.BFLOAT16,
}


def in_other_ways(case: Case, calls: Callable[[Case], Calls]) -> dict[str, Provider]:
    """``calls`` on a GPU by the Triton kernels; on a CPU in float32 by other instruction sets, and with equal bits in
    every batch. They take turns with the default, so that a few percent can be told from noise."""
    if case.device == "cuda":
        return {"triton": Provider(calls, functools.partial(lk.backends.use, "triton"))}
    if case.dtype != "float32":
        return {f"{OURS}, exact": Provider(calls, lk.backends.exact)}
    found = {f"{OURS}, batch-invariant": Provider(calls, lk.batch_invariant)}
    for isa in lk.backends.isas():
        if isa not in ("scalar", lk.backends.isa()):  # a call of the scalar kernels takes seconds
            found[f"{OURS}, {isa}"] = Provider(calls, functools.partial(lk.backends.use_isa, isa))
    return found


def linear(sizes: Sizes) -> Entries:
    """Those that multiply in float32 are held to its rounding. bitsandbytes' kernel rounds to bfloat16 in any case."""
    for case in sizes.cases("linear_4bit"):
        found = _base("linear") | in_other_ways(case, providers.linear_lowrank)
        if sizes.device == "cpu":
            bound = peer_int4.EXACT if case.dtype == "float32" else peer_int4.ROUNDED
            rounded = Provider(providers.linear_bitsandbytes, tolerance=5e-3)
            found = {n: dataclasses.replace(p, tolerance=bound) for n, p in provided(found).items()}
            if case.dtype == "float32":
                ours_and_torch = {name: found[name] for name in (OURS, "torch")}
                found |= with_medium(ours_and_torch)
            found |= LINEAR_PEERS[case.dtype] | {"bitsandbytes": rounded}
        yield case, found


def dx(sizes: Sizes) -> Entries:
    for case in sizes.cases("linear_4bit_dx"):
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


# -- the experts of a layer ------------------------------------------------------------------------

EXPERTS_SHAPE = (768, 2048)  # I and H of Qwen3-30B-A3B
EXPERTS = {OURS: experts.ours, "bitsandbytes": experts.bitsandbytes, "torch": experts.dense}
EXPERTS_TRAINED = {
    OURS: experts.ours, experts.BITSANDBYTES: experts.bitsandbytes, experts.PEFT: experts.dense,
}  # fmt: skip


def of_experts(sizes: Sizes) -> Entries:
    def case(op: str, M: int, dtype: str, R: int = 0) -> experts.ExpertsCase:
        return experts.ExpertsCase(op, *EXPERTS_SHAPE, M, dtype, "cold", R, sizes.device)

    def checked(found: dict[str, Callable]) -> dict[str, Provider]:
        return {name: Provider(calls, verify=experts.verify) for name, calls in found.items()}

    for dtype in sizes.dtypes:
        for M in sizes.experts_tokens:
            yield case("experts", M, dtype), checked(EXPERTS)
        for M in sizes.experts_training_tokens:
            yield case("experts_fwd_bwd", M, dtype, RANK), checked(EXPERTS_TRAINED)


# -- whole models ----------------------------------------------------------------------------------


def _load(name: str) -> torch.nn.Module:
    try:
        return loader(name)[0]()
    except UserError as reason:
        raise Unavailable(str(reason)) from None


def model(sizes: Sizes) -> Entries:
    """In both dtypes; a shape with random weights in float32 also under "medium"."""
    names = (OURS, models.PEFT, models.FUSED, models.BITSANDBYTES, models.DENSE)
    columns = {name: (name, contextlib.nullcontext) for name in names}
    for name, dtype in itertools.product(sizes.models, ("float32", "bfloat16")):
        medium = models.random_shape(name) is not None
        load = functools.partial(_load, name)
        yield from models.entries(name, load, columns, dtype, RANK, sizes.device, medium)


def provided(found: dict[str, Callable | Provider]) -> dict[str, Provider]:
    return {name: p if isinstance(p, Provider) else Provider(p) for name, p in found.items()}


OPS = {
    "model": model,
    "linear_4bit": linear,
    "linear_4bit_dx": dx,
    "lora_linear_4bit": lora,
    "multi_lora": multi_lora,
    "quantize": quantize,
    "grouped_linear_4bit": of_experts,
}


def entries(
    sizes: Sizes, names: list[str] | None = None, only: str = "", quick: bool = False
) -> list[tuple[Case | ModelCase, dict[str, Provider]]]:
    """Cases of the operators ``names`` whose id has ``only`` in it: the models, then a shape's together.

    ``quick``: of the first model and the first shape.
    """
    found: dict[Case | ModelCase, dict[str, Provider]] = {}
    places = [*sizes.models, *sizes.shapes, sizes.many_shape, EXPERTS_SHAPE]

    def place(case: Case | ModelCase) -> int:
        return places.index(case.model if case.op == "model" else (case.N, case.K))

    first = (0, len(sizes.models))
    for name in names or [op for op in OPS if not (quick and op == "model")]:
        for case, of_case in OPS[name](sizes):
            if only in case.id and (not quick or place(case) in first):
                found.setdefault(case, provided(of_case))
    return sorted(found.items(), key=lambda entry: place(entry[0]))
