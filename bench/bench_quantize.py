"""Quantize a dense matrix to NF4 with double quantization, and back."""

from lowrank_kernels.benchmark import providers

from .cases import DEVICE, cases

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


if DEVICE == "cuda":  # where the public function's wait for the device hides what it costs
    PROVIDERS["quantize_4bit"]["operators alone"] = providers.quantize_operators


def bench_quantize(timed):
    timed()
