"""Many adapters in one batch: their deltas alone, with the base, and in training."""

import itertools

from lowrank_kernels.benchmark import multi_providers
from lowrank_kernels.benchmark.case import MIX, Case

from . import cases
from .cases import DEVICE, DTYPES, MANY_SHAPE, MANY_TOKENS, RANK, SHAPES

POPULARITIES = ("identical", "uniform", "zipf", "distinct")


def many(op: str, shape: tuple[int, int], M: int, popularity: str, dtype=DTYPES[0]) -> Case:
    """``popularity`` "mixed": distinct adapters of the ranks MIX."""
    mixed = popularity == "mixed"
    popularity = "distinct" if mixed else popularity
    R = max(MIX) if mixed else RANK
    return Case(op, *shape, M, dtype, "cold", R, DEVICE, popularity, mixed)


def list_cases() -> list[Case]:
    """Punica's grid, and at the first shape what a server and a trainer do."""
    grid = [
        many("multi_lora_", MANY_SHAPE, M, popularity)
        for popularity, M in itertools.product(POPULARITIES, MANY_TOKENS)
        if M > 1 or popularity == "identical"  # of one row, all are the same
    ]
    decode = [
        many("multi_lora_", SHAPES[0], 64, popularity, dtype)
        for popularity, dtype in itertools.product(("distinct", "mixed"), DTYPES)
    ]
    decode.sort(key=lambda case: (case.dtype != DTYPES[0], case.mixed))  # few pools of adapters
    prefill = many("multi_lora_", SHAPES[0], 512, "4")
    linear = [
        many("multi_lora_linear_4bit", SHAPES[0], *batch)
        for batch in ((4, "distinct"), (64, "distinct"), (512, "4"))
    ]
    training = many("multi_lora_linear_4bit_fwd_bwd", SHAPES[0], 512, "2")
    return list(dict.fromkeys([*grid, *linear, prefill, *decode, training]))


CASES = list_cases()
ADDED = {
    "lowrank_kernels": multi_providers.many_lowrank,
    "torch loop": multi_providers.many_loop,
    "gather + bmm": multi_providers.many_gather_bmm,
}
if DEVICE == "cuda":
    ADDED["vLLM's scheme"] = multi_providers.many_vllm_triton
else:
    ADDED["vLLM's CPU scheme"] = multi_providers.many_vllm_cpu
IN_PLACE = {"torch loop, addmm_": multi_providers.many_loop_in_place}
PADDED = {"padded to 64": multi_providers.many_lowrank_padded}
PROVIDERS = {
    "multi_lora_": ADDED,
    "multi_lora_linear_4bit": {
        "lowrank_kernels": multi_providers.many_linear_lowrank,
        "linear_4bit, multi_lora_": multi_providers.many_linear_separate,
        "linear_4bit, torch loop": multi_providers.many_linear_loop,
    },
    "multi_lora_linear_4bit_fwd_bwd": {
        "lowrank_kernels": multi_providers.many_training_lowrank,
        "lora_linear_4bit per adapter": multi_providers.many_training_one_by_one,
        "linear_4bit, torch loop": multi_providers.many_training_loop,
        "dequantize, torch loop": multi_providers.many_training_dequantize,
    },
}


def providers_of(case: Case) -> dict:
    """Outside of the grid also a faster loop, and what padding costs where ranks are mixed."""
    of_op = PROVIDERS[case.op]
    if case.op != "multi_lora_" or cases.SHAPES[0] != (case.N, case.K):
        return of_op
    return of_op | IN_PLACE | (PADDED if case.mixed else {})


def bench_multi_lora(timed):
    timed()
