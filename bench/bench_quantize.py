"""Quantize a dense matrix to NF4 with double quantization, and back."""

from . import providers
from .cases import cases

CASES = [*cases("quantize_4bit", tokens=(0,)), *cases("dequantize_4bit", tokens=(0,))]
PROVIDERS = {
    "quantize_4bit": {
        "lowrank_kernels": providers.quantize_lowrank,
        "bitsandbytes": providers.quantize_bitsandbytes,
    },
    "dequantize_4bit": {
        "lowrank_kernels": providers.dequantize_lowrank,
        "bitsandbytes": providers.dequantize_bitsandbytes,
    },
}


def bench_quantize(timed):
    timed()
