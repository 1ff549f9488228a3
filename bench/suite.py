"""What the suite measures: for each operator its cases, and who computes them.

A new operator is a function in OPS that gives, of the sizes, pairs of a case and its providers.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator

from lowrank_kernels.benchmark import multi_providers as many
from lowrank_kernels.benchmark import ops, providers
from lowrank_kernels.benchmark.case import MIX, Case
from lowrank_kernels.benchmark.harness import Provider
from lowrank_kernels.benchmark.ops import OURS

from . import peer_ggml, peer_openvino, variants
from . import providers as others

Shapes = tuple[tuple[int, int], ...]
Entries = Iterator[tuple[Case, dict[str, Callable | Provider]]]

GROWTH = "linear_4bit_growth"
POPULARITIES = ("identical", "uniform", "zipf", "distinct")  # Punica's
RANK = 16


def growth_shapes(memory_bytes: int) -> Shapes:
    """Squares whose float32 weight is at most a sixteenth of the memory: copies of it take turns."""
    sizes = (512, 1024, 2048, 4096, 8192, 16384)
    return tuple((size, size) for size in sizes if 16 * 4 * size * size <= memory_bytes)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Weights [N, K] and numbers of rows; ``many_*``: of many adapters in one batch; ``growth_*``: of time with N K."""

    device: str
    shapes: Shapes
    tokens: tuple[int, ...]
    training_tokens: tuple[int, ...]
    dtypes: tuple[str, ...]
    growth_shapes: Shapes = ()
    growth_tokens: tuple[int, ...] = (1, 16, 512)
    # Punica's shape (4096 -> 11008) and numbers of rows.
    many_shape: tuple[int, int] = (11008, 4096)
    many_tokens: tuple[int, ...] = (1, 4, 16, 64)

    def chosen(self, shapes: list[tuple[int, int]] | None, tokens: list[int] | None) -> Sizes:
        """The same with other shapes and rows, where they are given."""
        changes = {}
        if shapes:
            changes |= {"shapes": tuple(shapes), "many_shape": shapes[-1]}
            changes |= {"growth_shapes": tuple(shapes) if self.growth_shapes else ()}
        if tokens:
            names = ("tokens", "training_tokens", "growth_tokens", "many_tokens")
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
GROWTH_SHAPES = growth_shapes(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
SIZES = {
    "cpu": Sizes("cpu", CPU_SHAPES, CPU_TOKENS, CPU_TOKENS, ("float32", "bfloat16"), GROWTH_SHAPES),
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
    variants.INT8: variants.int8,
}
LORA_ON_CUDA = {
    OURS: providers.lora_lowrank,
    "triton": variants.triton(providers.lora_lowrank),
    "torch": others.lora_addmm_dense,
    "bitsandbytes + PEFT": providers.lora_peft_bitsandbytes,
    "Unsloth's scheme": others.lora_addmm_dequantize,
    "Unsloth's scheme, bitsandbytes": others.lora_addmm_bitsandbytes,
}


def linear(sizes: Sizes) -> Entries:
    for case in sizes.cases("linear_4bit", hot=True):
        of_case = _base("linear")
        if case.device == "cuda":
            of_case |= {"triton": variants.triton(providers.linear_lowrank)}
        elif case.dtype == "float32":
            of_case |= FLOAT32_PEERS
        yield case, of_case | variants.of_linear(case, providers.linear_lowrank)


def dx(sizes: Sizes) -> Entries:
    on_cuda = {"triton": variants.triton(providers.dx_lowrank)} if sizes.device == "cuda" else {}
    for case in sizes.cases("linear_4bit_dx", hot=True):
        yield case, _base("dx") | on_cuda | variants.of_linear(case, providers.dx_lowrank)


def lora(sizes: Sizes) -> Entries:
    of_op = LORA_ON_CUDA if sizes.device == "cuda" else _base("lora")
    for case in sizes.cases("lora_linear_4bit", R=RANK):
        yield case, of_op | variants.of_lora(case)
    for case in sizes.cases("lora_linear_4bit_fwd_bwd", sizes.training_tokens, R=RANK):
        yield case, of_op


def quantize(sizes: Sizes) -> Entries:
    to = {OURS: others.quantize_lowrank, "bitsandbytes": others.quantize_bitsandbytes}
    if (
        sizes.device == "cuda"
    ):  # where the public function's wait for the device hides what it costs
        to["operators alone"] = others.quantize_operators
    back = {OURS: others.dequantize_lowrank, "bitsandbytes": others.dequantize_bitsandbytes}
    for op, of_op in (("quantize_4bit", to), ("dequantize_4bit", back)):
        for case in sizes.cases(op, tokens=(0,)):
            yield case, of_op


def growth(sizes: Sizes) -> Entries:
    """From small square matrices to large ones: does the cost per weight stay the same?"""
    for (N, K), M in itertools.product(sizes.growth_shapes, sizes.growth_tokens):
        of_case = {OURS: providers.linear_lowrank, "torch": providers.linear_torch}
        yield Case(GROWTH, N, K, M, device=sizes.device), of_case


# -- many adapters in one batch --------------------------------------------------------------------

ADDED = {
    OURS: many.many_lowrank,
    "torch loop": others.many_loop,
    "gather + bmm": others.many_gather_bmm,
}
VLLM = {"vLLM's CPU scheme": others.many_vllm_cpu}
LINEAR = {
    OURS: many.many_linear_lowrank,
    "linear_4bit, multi_lora_": others.many_linear_separate,
    "linear_4bit, torch loop": many.many_linear_loop,
}
TRAINING = {
    OURS: others.many_training_lowrank,
    "lora_linear_4bit per adapter": others.many_training_one_by_one,
    "linear_4bit, torch loop": others.many_training_loop,
    "dequantize, torch loop": others.many_training_dequantize,
}
IN_PLACE = {"torch loop, addmm_": others.many_loop_in_place}
PADDED = {"padded to 64": others.many_lowrank_padded}


def multi_lora(sizes: Sizes) -> Entries:
    """Punica's grid, and at the first shape what a server and a trainer do."""

    def case(op: str, M: int, popularity: str, dtype: str = sizes.dtypes[0], mixed=False) -> Case:
        R, device = max(MIX) if mixed else RANK, sizes.device
        return Case(op, *sizes.shapes[0], M, dtype, "cold", R, device, popularity, mixed)

    added = ADDED | (VLLM if sizes.device == "cpu" else {})
    shape = dict(zip("NK", sizes.many_shape))
    for popularity, M in itertools.product(POPULARITIES, sizes.many_tokens):
        if M > 1 or popularity == "identical":  # of one row, all are the same
            yield dataclasses.replace(case("multi_lora_", M, popularity), **shape), added
    for batch in ((4, "distinct"), (64, "distinct"), (512, "4")):
        yield case("multi_lora_linear_4bit", *batch), LINEAR
    yield case("multi_lora_", 512, "4"), added | IN_PLACE
    for dtype, mixed in itertools.product(sizes.dtypes, (False, True)):
        of_case = added | IN_PLACE | (PADDED if mixed else {})
        yield case("multi_lora_", 64, "distinct", dtype, mixed), of_case
    yield case("multi_lora_linear_4bit_fwd_bwd", 512, "2"), TRAINING


OPS = {
    "linear_4bit": linear,
    "linear_4bit_dx": dx,
    "lora_linear_4bit": lora,
    "multi_lora": multi_lora,
    "quantize": quantize,
    "growth": growth,
}


def entries(
    sizes: Sizes, names: list[str] | None = None, only: str = "", quick: bool = False
) -> list[tuple[Case, dict[str, Provider]]]:
    """Cases of the operators ``names`` whose id has ``only`` in it, a shape's together; quick: of the first shape."""
    found: dict[Case, dict[str, Provider]] = {}
    for name in names or OPS:
        for case, of_case in OPS[name](sizes):
            if only in case.id and (not quick or sizes.shapes[0] == (case.N, case.K)):
                made = {
                    n: p if isinstance(p, Provider) else Provider(p) for n, p in of_case.items()
                }
                found.setdefault(case, made)
    shapes = [*sizes.shapes, sizes.many_shape, *sizes.growth_shapes]
    return sorted(found.items(), key=lambda entry: shapes.index((entry[0].N, entry[0].K)))
