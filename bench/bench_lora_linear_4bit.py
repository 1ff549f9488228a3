"""Base and adapter together, r = 16: forward, and forward with the gradients of x, A and B."""

from lowrank_kernels.benchmark import providers
from lowrank_kernels.benchmark.case import Case

from . import variants
from .cases import DEVICE, RANK, TRAINING_TOKENS, cases

CASES = [
    *cases("lora_linear_4bit", R=RANK),
    *cases("lora_linear_4bit_fwd_bwd", TRAINING_TOKENS, R=RANK),
]
CPU_PROVIDERS = {
    "lowrank_kernels": providers.lora_lowrank,
    "torch + PEFT": providers.lora_peft_dense,
    "dequantize + matmul": providers.lora_dequantize,
    "bitsandbytes + PEFT": providers.lora_peft_bitsandbytes,
}
CUDA_PROVIDERS = {
    "lowrank_kernels": providers.lora_lowrank,
    "triton": providers.lora_triton,
    "torch": providers.lora_addmm_dense,
    "bitsandbytes + PEFT": providers.lora_peft_bitsandbytes,
    "Unsloth's scheme": providers.lora_addmm_dequantize,
    "Unsloth's scheme, bitsandbytes": providers.lora_addmm_bitsandbytes,
}
PROVIDERS = CUDA_PROVIDERS if DEVICE == "cuda" else CPU_PROVIDERS


def providers_of(case: Case) -> dict:
    return PROVIDERS | (variants.of_lora(case) if DEVICE == "cpu" else {})


def bench_lora_linear_4bit(timed):
    timed()
