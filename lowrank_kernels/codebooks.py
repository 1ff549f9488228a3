"""The tables behind 4-bit weights: codebooks, block sizes, dtypes and storages, each spelt here and nowhere else."""

from __future__ import annotations

import functools

import torch

from .arguments import BLOCKSIZES, FLOAT_DTYPES

# The 16 values of each 4-bit type, by nibble. The largest magnitude is 1, so that the largest element of a block,
# which defines its scale, is exact. One entry here is all that a type needs.
#
# nf4   Quantiles of the normal distribution, scaled to [-1, 1] (QLoRA, Dettmers et al. 2023, appendix E).
# fp4   Sign, 2 exponent bits, 1 mantissa bit, divided by the largest; bitsandbytes' values.
# int4  max(i - 8, -7) / 7 for nibble i: the integers -7 .. 7 of symmetric quantization without -8, divided by 7
#       (Wu et al. 2020, arXiv 2004.09602, section 3.1.2, "scale quantization", where the scale is 7 / absmax).
#       They are offset by 8, as in GPTQ's symmetric mode, Marlin and GGUF's Q4_0, which also have a level -8: under an
#       absmax scale that would either lie beyond the largest element or, as -1, leave +1 without a level. So nibble
#       0 means -1 here, as nibble 1 does.
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
    "int4": tuple(max(i - 8, -7) / 7.0 for i in range(16)),
}  # fmt: skip
BITSANDBYTES_CODES = ("nf4", "fp4")  # those that bitsandbytes reads as well
QUANT_TYPES = tuple(CODES)
# Types that are read, and that nothing is quantized to: their scales are not the absmax of a block.
#
# mxfp4  Sign, 2 exponent bits, 1 mantissa bit (E2M1), blocks of 32 under a power of two (OCP Microscaling Formats 1.0,
#        2023). Every product of code and scale is exact.
READ_CODES = {
    "mxfp4": tuple(
        sign * v for sign in (1.0, -1.0) for v in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    )
}
READ_TYPES = (*QUANT_TYPES, *READ_CODES)
DTYPES = {str(d).removeprefix("torch."): d for d in FLOAT_DTYPES}
STORAGES = {"uint8": torch.uint8, **DTYPES}
STORAGE_DTYPES = tuple(STORAGES.values())


def code_of(quant_type: str, device: torch.device | str | None = None) -> torch.Tensor:
    """The 16 float32 values of a 4-bit type; ValueError for a type that is in neither table."""
    if quant_type not in READ_TYPES:
        raise ValueError(f"quant_type: expected one of {READ_TYPES}, got {quant_type!r}")
    return torch.tensor((CODES | READ_CODES)[quant_type], dtype=torch.float32, device=device)


def check_quant_type(quant_type: object) -> None:
    """Raises ValueError for a type that nothing can be quantized to."""
    if quant_type not in QUANT_TYPES:
        only = ", which is only loaded" if quant_type in READ_TYPES else ""
        raise ValueError(f"quant_type: expected one of {QUANT_TYPES}, got {quant_type!r}{only}")


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
