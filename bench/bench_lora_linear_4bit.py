"""Base and adapter together, r = 16: forward, and forward with the gradients of x, A and B."""

from . import providers
from .cases import RANK, cases

CASES = [*cases("lora_linear_4bit", R=RANK), *cases("lora_linear_4bit_fwd_bwd", R=RANK)]
PROVIDERS = {
    "lowrank_kernels": providers.lora_lowrank,
    "torch + PEFT": providers.lora_peft_dense,
    "dequantize + matmul": providers.lora_dequantize,
    "bitsandbytes + PEFT": providers.lora_peft_bitsandbytes,
}


def bench_lora_linear_4bit(timed):
    timed()
