"""What is timed: one :class:`Case`, and the flops and bytes that its operator cannot do without."""

from __future__ import annotations

import dataclasses
import itertools

import torch

# What `choose` sets, before the modules of the suite are imported; until then, the CPU's.
DEVICE = "cpu"
SHAPES = ((4096, 4096), (11008, 4096))  # [N, K]: attention and MLP of a 7B model
TOKENS = (1, 4, 16, 64, 512)
TRAINING_TOKENS = TOKENS
DTYPES = ("float32", "bfloat16")
RANK = 16
BLOCKSIZE = 64


def choose(
    device: str, shapes: list[tuple[int, int]] | None = None, tokens: list[int] | None = None
) -> None:
    """Makes :func:`cases` list the cases of ``device``; other shapes and M where they are given."""
    global DEVICE, SHAPES, TOKENS, TRAINING_TOKENS, DTYPES
    if device == "cuda":
        DEVICE = device
        SHAPES = ((4096, 4096), (14336, 4096), (28672, 8192))  # MLPs of an 8B and a 70B model
        TOKENS = (1, 4, 16, 64, 256, 4096)
        TRAINING_TOKENS = (512, 4096)
        DTYPES = ("bfloat16",)
    SHAPES = tuple(shapes or SHAPES)
    TRAINING_TOKENS = tuple(tokens or TRAINING_TOKENS)
    TOKENS = tuple(tokens or TOKENS)


@dataclasses.dataclass(frozen=True)
class Case:
    """One operator at one size. ``R = 0``: no adapter; ``M = 0``: no activations.

    ``cache``: "cold" rotates over many weights, "hot" reuses one.
    """

    op: str
    N: int
    K: int
    M: int
    dtype: str = "float32"
    cache: str = "cold"
    R: int = 0
    device: str = "cpu"

    @property
    def id(self) -> str:
        rows = f"-M{self.M}" if self.M else ""
        return f"{self.op}-{self.N}x{self.K}{rows}-{self.dtype}-{self.cache}"

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
        base, lora = 2 * self.M * self.N * self.K, 2 * self.M * self.R * (self.N + self.K)
        if self.op == "lora_linear_4bit_fwd_bwd":
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
        adapter = self.R * (self.N + self.K) * 4
        if self.op == "lora_linear_4bit_fwd_bwd":
            # forward: W, A, B, X, Y; backward: W, A, B, X, dY in and dX, dA, dB out
            return 2 * self.weight_bytes + 3 * adapter + 2 * rows + self.M * self.K * size
        return self.weight_bytes + adapter + rows

    def limit_seconds(self, gbs: float, gflops: float) -> float:
        """The time that memory bandwidth or arithmetic alone would take, whichever is longer."""
        return max(self.bytes / (gbs * 1e9), self.flops / (gflops * 1e9))


def cases(
    op: str, tokens: tuple[int, ...] | None = None, hot: tuple[int, ...] = (), R: int = 0
) -> list[Case]:
    """``op`` at SHAPES x tokens x dtypes, cold, and on a CPU at the first shape in float32, hot.

    Shapes vary slowest: the harness holds the weights of one shape at a time.
    """
    cold = [
        Case(op, N, K, M, dtype, "cold", R, DEVICE)
        for (N, K), dtype, M in itertools.product(
            SHAPES, DTYPES, TOKENS if tokens is None else tokens
        )
    ]
    warm = [Case(op, *SHAPES[0], M, "float32", "hot", R) for M in hot if DEVICE == "cpu"]
    return sorted(cold + warm, key=lambda case: SHAPES.index((case.N, case.K)))
