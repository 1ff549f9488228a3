"""The emulator finds what it is there to find: a kernel with one fault put in must fail.

The kernel is built with the fault (a barrier taken out, a read past the end) and run in a process of its
own, under AddressSanitizer where memory is at stake.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import conftest

ROOT = pathlib.Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    "emulator" not in conftest.KERNELS, reason="LOWRANK_BACKEND or LOWRANK_TEST_DEVICE is set"
)

# What is wrong, file, text that occurs once or several times (the first is changed), text in its place.
BARRIER = "__syncthreads();"
MUTANTS = {
    "no barrier before the tiles are read": ("kernels/simt_tile.cuh", BARRIER, ""),
    "half of the threads at a barrier": (
        "kernels/simt_tile.cuh", BARRIER, "if (threadIdx.x >= 128) return; __syncthreads();"
    ),
    "no code for the device": (
        "launch.h",
        "if (*problem == '\\0') return cudaSuccess;",
        'return failed(cudaErrorNoKernelImageForDevice, name, shape, on.device, "");',
    ),
    "a column too many": ("kernels/simt_tile.cuh", "j0 + bj < cols", "j0 + bj <= cols"),
    "a row too many": ("kernels/simt_tile.cuh", "i0 + ai < rows", "i0 + ai <= rows"),
}  # fmt: skip

# Runs one operator that the fault is in, on every order, and says how it failed.
RUN = """
import sys
sys.path.insert(0, {tests!r})
import torch, cases, conftest, tolerance, emulator
from lowrank_kernels.schema import ops
torch.manual_seed(0)
case = cases.Case(M={M}, N=33, K=96, R=8)
args = cases.make("lora_linear_4bit", case)
with conftest.entered("emulator"):
    for order in emulator.ORDERS.values():
        with emulator.thread_order(*order):
            tolerance.check("lora_linear_4bit", args, ops.lora_linear_4bit(*args))
print("passed")
"""


def build_mutant(folder: pathlib.Path, mutant: str | None, flags: list[str]) -> pathlib.Path:
    """The emulator's library with only the general kernels in it, and one fault."""
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    if mutant is not None:
        file, old, new = MUTANTS[mutant]
        path = sources / "cuda" / file
        text = path.read_text()
        assert old in text, f"{file} no longer has {old!r}: the mutant {mutant!r} needs an update"
        path.write_text(text.replace(old, new, 1))
    # The fast families out of the way: they would take part of the problem.
    (sources / "cuda/launch/none.cu").write_text(NO_FAST_KERNELS)
    units = [sources / f"cuda/launch/{name}.cu" for name in UNITS]
    units.append(sources / "cuda/emulator/emulator.cpp")
    include = [f"-I{sources}", f"-I{sources / 'cuda/emulator/include'}"]
    library = folder / "liblowrank_cuda_emulated.so"
    common = ["-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
    command = [os.environ.get("CXX", "g++"), *common, "-Wno-unknown-pragmas", "-DLOWRANK_EMULATOR"]
    command += [*flags, *include, "-x", "c++", *map(str, units), "-o", str(library)]
    subprocess.run(command, check=True, timeout=300)
    return library


UNITS = ("library", "quantize", "simt", "linear", "multi", "grouped", "none")
NO_FAST_KERNELS = """
#include "cuda/launchers.h"
namespace lk::cuda {
bool gemv_takes(const LinearArgs&) { return false; }
int64_t gemv_workspace(const LinearArgs&, int) { return 0; }
cudaError_t gemv_linear(const LinearArgs&, const EpilogueOperand&, const Launch&) { return cudaErrorInvalidValue; }
bool mma_takes(const LinearArgs&) { return false; }
int64_t mma_workspace(const LinearArgs&, int) { return 0; }
cudaError_t mma_linear(const LinearArgs&, const EpilogueOperand&, const Launch&) { return cudaErrorInvalidValue; }
bool mma_takes(const BackwardArgs&) { return false; }
int64_t mma_workspace(const BackwardArgs&, int) { return 0; }
cudaError_t mma_dx(const BackwardArgs&, const EpilogueOperand&, const Launch&) { return cudaErrorInvalidValue; }
bool lora_takes(const Matrix&) { return false; }
bool lora_takes(const LinearArgs&) { return false; }
int64_t lora_workspace(const LinearArgs&, int) { return 0; }
cudaError_t lora_shrink(const LinearArgs&, const Launch&) { return cudaErrorInvalidValue; }
bool lora_takes(const BackwardArgs&) { return false; }
int64_t lora_workspace(const BackwardArgs&, int) { return 0; }
cudaError_t lora_gradients(const BackwardArgs&, const Launch&) { return cudaErrorInvalidValue; }
}  // namespace lk::cuda
"""


def run_on(library: pathlib.Path, M: int, sanitized: bool) -> subprocess.CompletedProcess:
    environment = {**os.environ, "LOWRANK_EMULATOR": str(library)}
    if sanitized:
        found = subprocess.run(
            [os.environ.get("CXX", "g++"), "-print-file-name=libasan.so"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        environment |= {"LD_PRELOAD": found.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    program = RUN.format(tests=str(pathlib.Path(__file__).parent), M=M)
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(mutant, sanitized) -> library; each is built once."""
    built = {}

    def get(mutant, sanitized):
        if (mutant, sanitized) not in built:
            flags = ["-O1", "-g", "-fsanitize=address"] if sanitized else ["-O1"]
            built[mutant, sanitized] = build_mutant(
                tmp_path_factory.mktemp("mutant") / "m", mutant, flags
            )
        return built[mutant, sanitized]

    return get


@pytest.mark.parametrize("sanitized", [False, True])
def test_the_kernel_without_a_fault_passes(build, sanitized):
    """So that the mutants below fail for their fault alone."""
    result = run_on(build(None, sanitized), 17, sanitized)
    assert result.returncode == 0 and "passed" in result.stdout, result.stderr[-3000:]


def test_a_missing_barrier_is_found(build):
    result = run_on(build("no barrier before the tiles are read", False), 17, False)
    assert result.returncode != 0 and "exceed the bound" in result.stderr, result.stderr[-3000:]


def test_a_barrier_that_some_threads_miss_is_found(build):
    """The launch fails, and the error names kernel, grid, architecture and what the block waits for."""
    result = run_on(build("half of the threads at a barrier", False), 17, False)
    assert result.returncode != 0
    error = result.stderr.strip().splitlines()[-1]
    assert "cudaErrorLaunchFailure in simt_product (S), grid (1, 1, 1), block (256, 1, 1)" in error
    assert (
        "capability 9.0: the block cannot go on: 128 of 256 threads at barrier 0; 128 exited"
        in error
    )


@pytest.mark.parametrize("mutant", ["a column too many", "a row too many"])
def test_a_read_past_the_end_is_found(build, mutant):
    """By AddressSanitizer, which names the line."""
    result = run_on(build(mutant, True), 17, True)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr and "simt" in result.stderr, result.stderr[
        -3000:
    ]


def test_a_device_that_the_library_has_no_code_for(build):
    """The error says what to build. (The emulator passes for an H200.)"""
    result = run_on(build("no code for the device", False), 17, False)
    assert result.returncode != 0
    error = result.stderr.strip().splitlines()[-1]
    assert "cudaErrorNoKernelImageForDevice in simt_product (S)" in error
    assert 'the library has code for emulator: rebuild with TORCH_CUDA_ARCH_LIST="9.0a"' in error
