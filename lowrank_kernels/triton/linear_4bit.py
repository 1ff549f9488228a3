"""y = x Wᵀ + bias with W in 4 bits."""

from __future__ import annotations

import torch

from .arguments import Unpack, sizes
from .product import product


def linear_4bit(x: torch.Tensor, *args) -> torch.Tensor:
    *weight, N, K, blocksize, bias = args
    unpack = Unpack(x)
    w = unpack.weight(*weight, N, K, blocksize)
    sizes(M=x.shape[0])
    x = unpack.matrix("x", x, x.shape[0], K)
    return product(x, w, N, K, blocksize, bias=unpack.vector("bias", bias, N))
