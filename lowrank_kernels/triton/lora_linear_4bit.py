"""lora_linear.py on a base in 4 bits."""

from __future__ import annotations

import torch

from .arguments import Unpack
from .lora_linear import backward, forward


def lora_linear_4bit(x, *args) -> tuple[torch.Tensor, torch.Tensor]:
    unpack, weight = Unpack(x), args[:9]
    return forward(unpack, x, unpack.weight(*weight), *weight[6:], *args[9:])


def lora_linear_4bit_backward(dy, x, s, *args):
    unpack, weight = Unpack(dy), args[:9]
    return backward(unpack, dy, x, s, unpack.weight(*weight), *weight[6:], *args[9:])
