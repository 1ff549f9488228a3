"""The quant state of a bitsandbytes checkpoint: JSON in a tensor of bytes. Each field is checked."""

from __future__ import annotations

import json
import math

import torch

from .arguments import NESTED_BLOCKSIZE
from .codebooks import BLOCKSIZES, DTYPES, READ_TYPES

# The key of a quant state is the weight's key, "." and this; a type that bitsandbytes does not know has such a key too.
KEY = "quant_state.bitsandbytes__"
KEYS = tuple(KEY + quant_type for quant_type in READ_TYPES)
KEYS_IN_WORDS = f"{KEY}<{'|'.join(READ_TYPES)}>"


def kind_of(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def read_quant_state(key: str, blob: torch.Tensor) -> dict:
    """The quant state's JSON, each field checked."""
    if blob.dtype != torch.uint8 or blob.dim() != 1 or blob.numel() > 4096 or blob.is_meta:
        came = f"{blob.dtype} {tuple(blob.shape)} on {blob.device}"
        raise ValueError(f"{key}: expected at most 4096 uint8 values, got {came}")
    try:
        state = json.loads(bytes(blob.tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{key}: expected JSON, got {bytes(blob[:40].tolist())!r}: {error}"
        ) from None
    if not isinstance(state, dict):
        raise ValueError(f"{key}: expected a JSON object, got {type(state).__name__}")

    def is_dim(value: object) -> bool:
        return type(value) is int and 0 <= value < 2**48

    def is_shape(value: object) -> bool:
        return (
            isinstance(value, list)
            and len(value) in (2, 3)
            and all(map(is_dim, value))
            and math.prod(value) < 2**62
        )

    nested = any(field.startswith("nested_") for field in state)
    fields = {
        "quant_type": (lambda v: v in READ_TYPES, f"one of {READ_TYPES}"),
        "blocksize": (lambda v: type(v) is int and v in BLOCKSIZES, f"one of {BLOCKSIZES}"),
        "dtype": (lambda v: isinstance(v, str) and v in DTYPES, f"one of {tuple(DTYPES)}"),
        "shape": (is_shape, "sizes [N, K], or [E, N, K] of a stack"),
    }
    if nested:
        fields |= {
            "nested_blocksize": (lambda v: v == NESTED_BLOCKSIZE, str(NESTED_BLOCKSIZE)),
            "nested_dtype": (lambda v: v == "float32", "'float32'"),
            "nested_offset": (
                lambda v: type(v) in (int, float) and abs(v) < 3.4e38,  # False for a NaN
                "a finite float32",
            ),
        }
    for field, (valid, words) in fields.items():
        if field not in state or not valid(state[field]):
            raise ValueError(f"{key}: {field}: expected {words}, got {state.get(field)!r}")
    if unknown := state.keys() - fields:
        raise ValueError(f"{key}: unknown fields {sorted(unknown)}")
    return state
