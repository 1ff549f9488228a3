"""y = x Wᵀ from small square matrices to large ones: does the cost per weight stay the same?"""

from lowrank_kernels.benchmark import providers
from lowrank_kernels.benchmark.case import Case

from .cases import DEVICE, GROWTH_SHAPES, GROWTH_TOKENS

CASES = [
    Case("linear_4bit_growth", N, K, M, device=DEVICE)
    for N, K in GROWTH_SHAPES
    for M in GROWTH_TOKENS
]
PROVIDERS = {"lowrank_kernels": providers.linear_lowrank, "torch": providers.linear_torch}


def bench_growth(timed):
    timed()
