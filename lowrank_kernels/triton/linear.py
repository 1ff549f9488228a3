"""y = x Wᵀ + bias and dx = dy W with W in 4 bits."""

from __future__ import annotations

import torch

from ..arguments import WeightArgs, flat
from .matmul import matmul
from .unpack import Unpack, sizes


@flat
def linear_4bit(x: torch.Tensor, args: WeightArgs, bias: torch.Tensor | None) -> torch.Tensor:
    unpack, M = Unpack(x), x.shape[0]
    w = unpack.weight(args)
    sizes(M=M)
    x, bias = unpack.matrix("x", x, M, args.K), unpack.vector("bias", bias, args.N)
    return matmul(x, w, args.N, args.K, args.blocksize, bias=bias)


@flat
def linear_4bit_dx(dy: torch.Tensor, args: WeightArgs) -> torch.Tensor:
    unpack, M = Unpack(dy), dy.shape[0]
    w = unpack.weight(args)
    sizes(M=M)
    dy = unpack.matrix("dy", dy, M, args.N)
    return matmul(dy, w, args.N, args.K, args.blocksize, backward=True)
