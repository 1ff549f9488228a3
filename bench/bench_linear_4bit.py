"""y = x Wᵀ with W in 4 bits: inference, and the base half of training's forward."""

from . import peer_ggml, peer_openvino, providers, variants
from .cases import DEVICE, TOKENS, Case, cases
from .tables import INT8

CASES = cases("linear_4bit", hot=TOKENS)
PROVIDERS = {
    "lowrank_kernels": providers.linear_lowrank,
    "torch": providers.linear_torch,
    "dequantize + matmul": providers.linear_dequantize,
    "bitsandbytes": providers.linear_bitsandbytes,
}
if DEVICE == "cuda":
    PROVIDERS["triton"] = providers.linear_triton
else:
    PROVIDERS[peer_openvino.NAME] = peer_openvino.linear_openvino
    PROVIDERS[peer_ggml.NAME] = peer_ggml.linear_ggml
    PROVIDERS[INT8] = variants.linear_int8


def providers_of(case: Case) -> dict:
    return PROVIDERS | variants.of_linear(case, providers.linear_lowrank)


def bench_linear_4bit(timed):
    timed()
