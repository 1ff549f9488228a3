"""Every operator once on small shapes: what compute-sanitizer runs under ``python -m bench.gpu``.

Inputs are made on the CPU, so that the kernels launched are this library's and few others.
"""

from __future__ import annotations

import sys

import torch

import lowrank_kernels as lk
from lowrank_kernels.multi_lora.functional import multi_lora_linear_4bit
from lowrank_kernels.schema import ops

# [N, K]: tiles that fit, a ragged one, and blocks that cross rows; M for each family of kernels.
SHAPES = ((256, 512), (136, 192), (33, 70))
TOKENS = (1, 5, 17, 128)
RANK = 8
MANY_RANKS = (8, 20)  # of the adapters that rows take turns with


def run(device: str, dtype: torch.dtype = torch.bfloat16) -> int:
    """Runs them all; how many calls that were. Raises ValueError for a result that is not finite."""
    calls = 0

    def finite(*outputs: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if not all(bool(out.cpu().isfinite().all()) for out in outputs):
            raise ValueError(f"call {calls}: a result is not finite")

    torch.manual_seed(0)
    for N, K in SHAPES:
        dense = torch.randn(N, K).to(dtype).to(device)
        for double_quant in (True, False):
            w = lk.quantize_4bit(dense, "nf4", 64, double_quant)
            finite(w.dequantize(dtype))
            A, B = (
                torch.randn(*shape).to(device).requires_grad_() for shape in ((RANK, K), (N, RANK))
            )
            for M in TOKENS:
                x, dy = (torch.randn(M, n).to(dtype).to(device) for n in (K, N))
                finite(lk.linear_4bit(x, w))
                finite(ops.linear_4bit_dx(dy, *w.op_args()))
                y = lk.lora_linear_4bit(x.requires_grad_(), w, A, B, 2.0, dropout_p=0.1)
                finite(y.detach(), *torch.autograd.grad(y, [x, A, B], dy))
        for M in TOKENS:
            finite(*_many(w, M, dtype, device))
    return calls


def _many(w: lk.Weight4bit, M: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Results and gradients of a batch in which every third row has no adapter."""
    (N, K), layer = w.shape, lk.LoRALinear4bit.from_weight(w)
    for rank in MANY_RANKS:
        layer.add_adapter(str(rank), rank, init_lora_weights=False)
    bank = lk.AdapterBank({"layer": layer}, sum(-(-rank // 8) for rank in MANY_RANKS))
    names = [str(rank) for rank in MANY_RANKS]
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
    print(f"{run(sys.argv[1] if len(sys.argv) > 1 else 'cuda')} calls, all results finite")
