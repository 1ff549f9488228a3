"""Every operator once on small shapes: what compute-sanitizer runs under ``make gpu``.

Inputs are made on the CPU, so that the kernels launched are this library's and few others.
"""

from __future__ import annotations

import sys

import torch

import lowrank_kernels as lk
from lowrank_kernels.cli.doctor import check_layer
from lowrank_kernels.multi_lora.functional import multi_lora_linear_4bit

# [N, K]: tiles that fit, a ragged one, and blocks that cross rows; M for each family of kernels.
SHAPES = ((256, 512), (136, 192), (33, 70))
TOKENS = (1, 5, 17, 128)
RANKS = (8, 20)  # of the adapters that rows take turns with


def run(device: str, dtype: torch.dtype = torch.bfloat16) -> int:
    """Runs them all; how many batches that were. Raises AssertionError for a wrong result."""
    for N, K in SHAPES:
        w = lk.quantize_4bit(torch.randn(N, K).to(dtype).to(device), double_quant=False)
        for M in TOKENS:
            check_layer(M, N, K, 8, device, dtype)
            outputs = [
                *_many(w, M, dtype, device),
                lk.linear_4bit(torch.randn(M, K).to(w.packed.device, dtype), w),
            ]
            assert all(bool(out.cpu().isfinite().all()) for out in outputs), (
                f"{N} x {K}, M = {M}: not finite"
            )
    return len(SHAPES) * len(TOKENS)


def _many(w: lk.Weight4bit, M: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Results and gradients of a batch in which every third row has no adapter."""
    (N, K), layer = w.shape, lk.LoRALinear4bit.from_weight(w)
    names = [str(rank) for rank in RANKS]
    for name, rank in zip(names, RANKS):
        layer.add_adapter(name, rank, init_lora_weights=False)
    bank = lk.AdapterBank({"layer": layer}, sum(-(-rank // 8) for rank in RANKS))
    for name in names:
        bank.load(name)
    parameters = bank.trainable(*names)
    batch = bank.plan([[*names, None][m % 3] for m in range(M)]), bank["layer"]
    x, dy = (torch.randn(M, n).to(dtype).to(device) for n in (K, N))
    y = multi_lora_linear_4bit(x.requires_grad_(), w, *batch)
    gradients = torch.autograd.grad(y, [x, *parameters], dy, allow_unused=True)
    added = lk.multi_lora_(torch.zeros_like(dy), x.detach(), *batch)
    return [t.detach() for t in (y, added, *gradients) if t is not None]


if __name__ == "__main__":
    print(f"{run(sys.argv[1] if len(sys.argv) > 1 else 'cuda')} batches, all right")
