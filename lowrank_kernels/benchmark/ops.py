"""The operators that can be measured by name, and who computes each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from . import multi_providers, providers
from .case import Case
from .providers import Calls

OURS = "lowrank_kernels"
PEERS = ("torch", "bitsandbytes", "dequantize")
ADAPTERS = 4  # of multi_lora, or as many as there are rows


@dataclasses.dataclass(frozen=True)
class Op:
    """``peers``: by the name that results have, which begins with one of PEERS. ``adapter``: it has a rank."""

    op: str
    ours: Callable[[Case], Calls]
    peers: dict[str, Callable[[Case], Calls]]
    adapter: bool = False


_LORA_PEERS = {
    "torch + PEFT": providers.lora_peft_dense,
    "dequantize + matmul": providers.lora_dequantize,
    "bitsandbytes + PEFT": providers.lora_peft_bitsandbytes,
}
OPS = {
    "linear": Op(
        "linear_4bit",
        providers.linear_lowrank,
        {
            "torch": providers.linear_torch,
            "dequantize + matmul": providers.linear_dequantize,
            "bitsandbytes": providers.linear_bitsandbytes,
        },
    ),
    "dx": Op(
        "linear_4bit_dx",
        providers.dx_lowrank,
        {
            "torch": providers.dx_torch,
            "dequantize + matmul": providers.dx_dequantize,
            "bitsandbytes": providers.dx_bitsandbytes,
        },
    ),
    "lora": Op("lora_linear_4bit", providers.lora_lowrank, _LORA_PEERS, adapter=True),
    "training": Op("lora_linear_4bit_fwd_bwd", providers.lora_lowrank, _LORA_PEERS, adapter=True),
    "multi_lora": Op(
        "multi_lora_linear_4bit",
        multi_providers.many_linear_lowrank,
        {"torch loop": multi_providers.many_linear_loop},
        adapter=True,
    ),
}
