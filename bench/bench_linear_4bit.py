"""y = x Wᵀ with W in 4 bits: inference, and the base half of training's forward."""

from lowrank_kernels.benchmark import providers
from lowrank_kernels.benchmark.case import Case

from . import peer_ggml, peer_openvino, variants
from .cases import DEVICE, TOKENS, cases
from .tables import INT8

CASES = cases("linear_4bit", hot=TOKENS)
PROVIDERS = {
    "lowrank_kernels": providers.linear_lowrank,
    "torch": providers.linear_torch,
    "dequantize + matmul": providers.linear_dequantize,
    "bitsandbytes": providers.linear_bitsandbytes,
}
FLOAT32_PROVIDERS = {}  # more of them for float32 activations
if DEVICE == "cuda":
    PROVIDERS["triton"] = providers.linear_triton
else:
    FLOAT32_PROVIDERS = {
        peer_openvino.NAME: peer_openvino.linear_openvino,
        "bitsandbytes, training": providers.linear_bitsandbytes_training,
        peer_ggml.NAME: peer_ggml.linear_ggml,
        INT8: variants.linear_int8,
    }


def providers_of(case: Case) -> dict:
    more = FLOAT32_PROVIDERS if case.dtype == "float32" else {}
    return PROVIDERS | more | variants.of_linear(case, providers.linear_lowrank)


def bench_linear_4bit(timed):
    timed()
