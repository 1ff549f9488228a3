"""What is timed: one :class:`Case`, and the flops and bytes that its operator cannot do without; or a whole model."""

from __future__ import annotations

import dataclasses
import math

import torch

BLOCKSIZE = 64
# Of many adapters in one batch: the ranks of S-LoRA's mixed settings.
MIX = (8, 16, 32, 64)
POOL = 64  # adapters that the batches are drawn from


def rows_per_adapter(M: int, popularity: str) -> list[int]:
    """How many of M rows each adapter has.

    As in Punica's benchmarks: "identical": one adapter; "uniform": ceil(sqrt(M)) of them, evenly;
    "zipf": 1, 1.5, 1.5², ... rows, rounded down, and one adapter with the rest, most first;
    "distinct": one row each. A number: as many adapters, evenly.
    """
    if popularity == "zipf":
        counts, size = [], 1.0
        while sum(counts) + int(size) < M:
            counts.append(int(size))
            size *= 1.5
        return sorted([*counts, M - sum(counts)], reverse=True)
    known = {"identical": 1, "uniform": math.isqrt(M - 1) + 1, "distinct": M}
    adapters = known[popularity] if popularity in known else int(popularity)
    return [M // adapters + (u < M % adapters) for u in range(adapters)]


@dataclasses.dataclass(frozen=True)
class Case:
    """One operator at one size. ``R = 0``: no adapter; ``M = 0``: no activations.

    ``cache``: "cold" rotates over many weights, "hot" reuses one. ``popularity``: of many adapters,
    see :func:`rows_per_adapter`; their rank is R, or, where ``mixed``, each of MIX in turn.
    """

    op: str
    N: int
    K: int
    M: int
    dtype: str = "float32"
    cache: str = "cold"
    R: int = 0
    device: str = "cpu"
    popularity: str = ""
    mixed: bool = False

    @property
    def id(self) -> str:
        rows = f"-M{self.M}" if self.M else ""
        many = f"-{self.popularity}{'-mixed' * self.mixed}" if self.popularity else ""
        return f"{self.op}-{self.N}x{self.K}{rows}{many}-{self.dtype}-{self.cache}"

    @property
    def rows(self) -> list[int]:
        """Rows of each adapter in the batch."""
        return rows_per_adapter(self.M, self.popularity) if self.popularity else [self.M]

    @property
    def ranks(self) -> list[int]:
        return [MIX[u % len(MIX)] if self.mixed else self.R for u in range(len(self.rows))]

    @property
    def groups(self) -> int:
        """How many batches with adapters of their own take turns."""
        alone = self.mixed or self.cache == "hot"
        return 1 if alone else max(1, POOL // len(self.rows))

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def weight_bytes(self) -> int:
        """NF4, double quantization: nibbles, a byte per block, a float per 256 blocks."""
        blocks = -(-self.N * self.K // BLOCKSIZE)
        return -(-self.N * self.K // 2) + blocks + 4 * -(-blocks // 256)

    @property
    def flops(self) -> int:
        """Multiplies and adds of the matrix products; 0 for quantize and dequantize."""
        base = 0 if self.op == "multi_lora_" else 2 * self.M * self.N * self.K
        weighted = sum(rows * rank for rows, rank in zip(self.rows, self.ranks))
        lora = 2 * weighted * (self.N + self.K)
        if self.op.endswith("fwd_bwd"):
            # dX = dY W and dS A;  dS = dY B;  dA = dSᵀ X;  dB = dYᵀ S: twice the adapter's forward
            return 2 * base + 3 * lora
        return base + lora

    @property
    def bytes(self) -> int:
        """Bytes that must be read or written once if nothing is kept between calls."""
        size = self.torch_dtype.itemsize
        if not self.M:  # quantize_4bit, dequantize_4bit: one side dense, one side packed
            return self.weight_bytes + self.N * self.K * size
        rows = self.M * (self.N + self.K) * size
        # Many adapters lie in pages of the activations' dtype, one alone is float32 as PEFT keeps it.
        adapter = sum(self.ranks) * (self.N + self.K) * (size if self.popularity else 4)
        if self.op == "multi_lora_":  # y is read as well
            return adapter + rows + self.M * self.N * size
        if self.op.endswith("fwd_bwd"):
            # forward: W, A, B, X, Y; backward: W, A, B, X, dY in and dX, dA, dB out
            return 2 * self.weight_bytes + 3 * adapter + 2 * rows + self.M * self.K * size
        return self.weight_bytes + adapter + rows

    def document(self) -> dict:
        """What a result document says of this case."""
        return dataclasses.asdict(self) | {"flops": self.flops, "bytes": self.bytes}

    def rate(self, result: dict) -> dict[str, float]:
        """What a result of this case has besides; see models.py."""
        return {}

    def limit_seconds(self, gbs: float, gflops: float) -> float:
        """The time that memory bandwidth or arithmetic alone would take, whichever is longer."""
        return max(self.bytes / (gbs * 1e9), self.flops / (gflops * 1e9))


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """A whole model, see models.py, in one ``phase``; ``tokens``: how many a call handles, which rates are made of."""

    model: str
    phase: str
    tokens: int
    dtype: str = "float32"
    R: int = 16
    device: str = "cpu"
    op: str = "model"

    @property
    def id(self) -> str:
        return f"{self.op}-{self.model}-{self.phase}-{self.dtype}"

    def document(self) -> dict:
        """What a result document says of this case."""
        return dataclasses.asdict(self)

    def rate(self, result: dict) -> dict[str, float]:
        return {"tokens_per_second": self.tokens / result["median_ms"] * 1e3}
