"""ggml's product with an IQ4_NL weight, as llama.cpp runs it on a CPU.

Not the same computation: weights have a 4-bit code of ggml's own, blocks of 32 with a half-precision
scale (4.5 bits a weight), and activations are rounded to 8-bit integers in blocks of 32. ggml is
built on demand, by ``make bench-peers``, from llama-cpp-python's source archive.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import pathlib
import weakref

import torch

from lowrank_kernels.benchmark import providers
from lowrank_kernels.benchmark.case import Case
from lowrank_kernels.benchmark.harness import Provider
from lowrank_kernels.benchmark.providers import Calls, Unavailable

NAME = "ggml IQ4_NL (int8 activations)"
TOLERANCE = 1e-2  # of the norm, against its own weights; 5.3e-3 was measured
# The values of its 4-bit codes.
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

LIBRARY = pathlib.Path(__file__).parent.parent / "build" / "ggml" / "cmake" / "liblowrank_ggml.so"


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The driver of ggml/driver.cpp. Loaded after torch, it shares torch's OpenMP and threads.

    Raises Unavailable where it is not built.
    """
    if not LIBRARY.exists():
        raise Unavailable("ggml is not built: make bench-peers")
    try:
        driver = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise Unavailable(f"ggml: {error}") from None
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    signatures = {
        "version": (ctypes.c_char_p, []),
        "error": (ctypes.c_char_p, []),
        "bytes": (ctypes.c_size_t, [size, size]),
        "quantize": (None, [pointer, size, size, pointer]),
        "create": (pointer, [size, size, number, number, pointer]),
        "run": (number, [pointer, number, pointer, size, pointer]),
        "destroy": (None, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(driver, f"lowrank_ggml_{name}")
        function.restype, function.argtypes = result, arguments
    return driver


def version() -> str | None:
    """ggml's, or None where it is not built."""
    try:
        return library().lowrank_ggml_version().decode()
    except Unavailable:
        return None


@functools.lru_cache(maxsize=1)
def _blocks(N: int, K: int) -> torch.Tensor:
    """The matrix of :func:`providers.dense_weight` in IQ4_NL; one shape is held at a time."""
    driver, rows = library(), 64
    dense = providers.dense_weight(N, K, "cpu")
    blocks = torch.empty(N, driver.lowrank_ggml_bytes(N, K) // N, dtype=torch.uint8)

    def quantize(row: int) -> None:
        of_dense, of_blocks = dense[row : row + rows], blocks[row : row + rows]
        driver.lowrank_ggml_quantize(of_dense.data_ptr(), len(of_dense), K, of_blocks.data_ptr())

    with concurrent.futures.ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(quantize, range(0, N, rows)))
    return blocks


def values(N: int, K: int) -> torch.Tensor:
    """What the blocks of the matrix mean: of each 32 weights a scale in half precision, then 16 bytes, whose low halves
    are the codes of the first 16 and whose high halves those of the others."""
    blocks = _blocks(N, K).view(N, K // 32, 18)
    scales = blocks[..., :2].contiguous().view(torch.float16).double()
    codes = torch.cat([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], 2).long()
    return (torch.tensor(LEVELS, dtype=torch.float64)[codes] * scales).view(N, K)


class _Weights:
    """Copies of a matrix in ggml's memory, freed with this object."""

    def __init__(self, N: int, K: int, count: int):
        self.driver = library()
        threads, blocks = torch.get_num_threads(), _blocks(N, K).data_ptr()
        self.handle = self.driver.lowrank_ggml_create(N, K, count, threads, blocks)
        if not self.handle:
            raise Unavailable(self.driver.lowrank_ggml_error().decode())
        weakref.finalize(self, self.driver.lowrank_ggml_destroy, self.handle)

    def run(self, index: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y = x times copy ``index``, transposed."""
        pointers = x.data_ptr(), x.shape[0], y.data_ptr()
        if self.driver.lowrank_ggml_run(self.handle, index, *pointers):
            raise RuntimeError(self.driver.lowrank_ggml_error().decode())
        return y


@functools.lru_cache(maxsize=1)
def _weights(N: int, K: int, count: int) -> _Weights:
    """Kept for the next M of the shape."""
    return _Weights(N, K, count)


def linear_ggml(case: Case) -> Calls:
    """One call per copy, all with the same x and the same memory for y.

    Raises Unavailable where ggml has no interleaved kernel.
    """
    if case.dtype != "float32":
        raise Unavailable("ggml multiplies float32 activations only")
    nbytes = library().lowrank_ggml_bytes(case.N, case.K)
    if not nbytes:
        raise Unavailable("ggml's interleaved IQ4_NL needs N % 8 and K % 32 to be 0")
    count = providers.copies(case, nbytes)
    weights = _weights(case.N, case.K, count)
    x, y = providers.x_of(case), torch.zeros(case.M, case.N)
    return [functools.partial(weights.run, index, x, y) for index in range(count)]


PROVIDER = Provider(linear_ggml, tolerance=TOLERANCE, weight=values)
