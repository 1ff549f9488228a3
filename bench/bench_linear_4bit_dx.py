"""dx = dy W with W in 4 bits: the gradient that flows through a frozen base."""

from lowrank_kernels.benchmark import providers
from lowrank_kernels.benchmark.case import Case

from . import variants
from .cases import DEVICE, TOKENS, cases

CASES = cases("linear_4bit_dx", hot=TOKENS)
PROVIDERS = {
    "lowrank_kernels": providers.dx_lowrank,
    "torch": providers.dx_torch,
    "dequantize + matmul": providers.dx_dequantize,
    "bitsandbytes": providers.dx_bitsandbytes,
}
if DEVICE == "cuda":
    PROVIDERS["triton"] = providers.dx_triton


def providers_of(case: Case) -> dict:
    return PROVIDERS | variants.of_linear(case, providers.dx_lowrank)


def bench_linear_4bit_dx(timed):
    timed()
