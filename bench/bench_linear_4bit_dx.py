"""dx = dy W with W in 4 bits: the gradient that flows through a frozen base."""

from . import providers
from .cases import DEVICE, cases

CASES = cases("linear_4bit_dx")
PROVIDERS = {
    "lowrank_kernels": providers.dx_lowrank,
    "torch": providers.dx_torch,
    "dequantize + matmul": providers.dx_dequantize,
    "bitsandbytes": providers.dx_bitsandbytes,
}
if DEVICE == "cuda":
    PROVIDERS["triton"] = providers.dx_triton


def bench_linear_4bit_dx(timed):
    timed()
