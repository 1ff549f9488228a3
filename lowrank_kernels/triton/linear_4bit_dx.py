"""dx = dy W with W in 4 bits."""

from __future__ import annotations

import torch

from .arguments import Unpack, sizes
from .product import product


def linear_4bit_dx(dy: torch.Tensor, *args) -> torch.Tensor:
    *weight, N, K, blocksize = args
    unpack = Unpack(dy)
    w = unpack.weight(*weight, N, K, blocksize)
    sizes(M=dy.shape[0])
    return product(unpack.matrix("dy", dy, dy.shape[0], N), w, N, K, blocksize, backward=True)
