"""The tables behind 4-bit weights: codebooks, block sizes, dtypes and storages, each spelt here and nowhere else."""

from __future__ import annotations

import functools

import torch

from .schema import FLOAT_DTYPES

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# NF4: quantiles of the normal distribution, scaled to [-1, 1] (QLoRA, Dettmers et al. 2023, appendix E).
# FP4: sign, 2 exponent bits, 1 mantissa bit; bitsandbytes' values, largest = 1.
CODES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(v / 12.0 for v in (
        0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0,
    )),
}  # fmt: skip
DTYPES = {str(d).removeprefix("torch."): d for d in FLOAT_DTYPES}
STORAGES = {"uint8": torch.uint8, **DTYPES}
STORAGE_DTYPES = tuple(STORAGES.values())


def code_of(quant_type: str, device: torch.device | str | None = None) -> torch.Tensor:
    """The 16 float32 values of "nf4" or "fp4"."""
    if not isinstance(quant_type, str) or quant_type not in CODES:
        raise ValueError(f"quant_type: expected 'nf4' or 'fp4', got {quant_type!r}")
    return torch.tensor(CODES[quant_type], dtype=torch.float32, device=device)


def dynamic_code(device: torch.device | str | None = None) -> torch.Tensor:
    """The 256 sorted float32 values of the signed dynamic 8-bit type (Dettmers et al., arXiv 1511.04561, 2110.02861).

    Seven decades 10^-6 .. 10^0; decade i holds 2^i fractions, the midpoints of equal steps of [0.1, 1],
    with both signs; then 0 and 1.
    """
    return torch.tensor(_dynamic_values(), dtype=torch.float32, device=device)


@functools.cache
def _dynamic_values() -> tuple[float, ...]:
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        for sign in (1, -1):
            values += (sign * 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
    return tuple(sorted(values))


def check_blocksize(blocksize: object) -> None:
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize: expected one of {BLOCKSIZES}, got {blocksize!r}")
