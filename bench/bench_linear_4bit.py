"""y = x Wᵀ with W in 4 bits: inference, and the base half of training's forward."""

from . import providers
from .cases import DEVICE, TOKENS, cases

CASES = cases("linear_4bit", hot=TOKENS)
PROVIDERS = {
    "lowrank_kernels": providers.linear_lowrank,
    "torch": providers.linear_torch,
    "dequantize + matmul": providers.linear_dequantize,
    "bitsandbytes": providers.linear_bitsandbytes,
}
if DEVICE == "cuda":
    PROVIDERS["triton"] = providers.linear_triton


def bench_linear_4bit(timed):
    timed()
