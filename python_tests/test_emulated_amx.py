"""The kernels for AMX on tile registers in software: the tests of their instruction set, in a process of their own.

The kernels are those of every build, compiled once more; what differs is that an instruction on tile registers is a
function (csrc/cpu/amx/emulated_tiles.h). It says nothing about speed.
"""

import ctypes
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

import conftest
import emulated_amx
from lowrank_kernels.schema import OPS

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
# `make test` names it, and builds it.
LIBRARY = os.environ.get("LOWRANK_EMULATED_AMX", emulated_amx.LIBRARY)
TOPICS = (*OPS, "multi_lora", "kernels", "products", "int8_activations", "dispatch", "edges")
FILES = sorted({HERE / f"test_{topic}.py" for topic in TOPICS})

pytestmark = pytest.mark.skipif(
    conftest.KERNELS[0] != "cpu-scalar", reason="this is about the CPU kernels"
)


def test_the_instruction_set_passes_its_tests():
    reason = emulated_amx.why_not(LIBRARY)
    if reason:
        pytest.skip(reason)
    files = [str(file) for file in FILES if file.exists()]
    words = "amx or instruction_set"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", words, *files],
        cwd=ROOT, capture_output=True, text=True, timeout=3600 if conftest.FULL else 600,
        env=os.environ | {"LOWRANK_ISA": "", **emulated_amx.environment(LIBRARY)},
    )  # fmt: skip
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(passed[1]) > 500, done.stdout[-2000:]


# -- the instructions themselves -------------------------------------------------------------------

# A product of registers of M rows and K dwords: c += a b, instruction 0 for bfloat16, 1 for bytes.
PROGRAM = """
#include <immintrin.h>
#include <cstddef>
#include "common/half.h"
#pragma GCC target("avx2,fma")
namespace lk { namespace {
#include "cpu/amx/emulated_tiles.h"
} }
using namespace lk;
extern "C" void product(int instruction, int M, int K, const void* a, const void* b, void* c) {
  alignas(64) uint8_t config[64] = {1};
  const int bytes[] = {64, 4 * K, 64}, rows[] = {M, M, K};
  for (int t = 0; t < 3; ++t) config[16 + 2 * t] = uint8_t(bytes[t]), config[48 + t] = uint8_t(rows[t]);
  _tile_loadconfig(config);
  _tile_loadd(0, c, 64);
  _tile_loadd(1, a, 4 * K);
  _tile_loadd(2, b, 64);
  if (instruction == 0) _tile_dpbf16ps(0, 1, 2);
  if (instruction == 1) _tile_dpbssd(0, 1, 2);
  if (instruction == 2) _tile_dpbf16ps(0, 2, 1);
  _tile_stored(0, c, 64);
  _tile_release();
  if (instruction == 3) _tile_zero(0);
}
"""


@pytest.fixture(scope="module")
def product(tmp_path_factory):
    """The product of the program as a function of numpy arrays."""
    compiler = os.environ.get("CXX", "g++")
    if platform.machine() != "x86_64" or shutil.which(compiler) is None:
        pytest.skip("needs a C++ compiler for x86")
    source = tmp_path_factory.mktemp("tiles") / "tiles.cpp"
    source.write_text(PROGRAM)
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
    library = source.with_suffix(".so")
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True, timeout=100)
    function = ctypes.CDLL(str(library)).product

    def run(instruction, a, b, c):
        pointers = [x.ctypes.data_as(ctypes.c_void_p) for x in (a, b, c)]
        function(instruction, len(a), a.nbytes // len(a) // 4, *pointers)
        return c

    run.library = library
    return run


def bf16(numbers) -> np.ndarray:
    """The bits of numbers that bfloat16 holds exactly."""
    return (np.asarray(numbers, np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize(("M", "K"), [(16, 16), (5, 3), (1, 16), (16, 1)])
def test_products_of_pairs(M, K, product):
    """Pair k of a row of a meets row k of b, where columns are pairs: c[m, n] += Σ_j a[m, k, j] b[k, n, j]."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-8, 9, (M, K, 2)), rng.integers(-8, 9, (K, 16, 2))
    c = rng.integers(-8, 9, (M, 16)).astype(np.float32)
    expected = c + np.einsum("mkj,knj->mn", a, b)
    assert (product(0, bf16(a), bf16(b), c) == expected).all()
    a, b = rng.integers(-128, 128, (M, K, 4)), rng.integers(-128, 128, (K, 16, 4))
    c = rng.integers(-(2**31), 2**31, (M, 16)).astype(np.int32)
    expected = (c + np.einsum("mkj,knj->mn", a, b)).astype(np.int32)  # wraps around
    assert (product(1, a.astype(np.int8), b.astype(np.int8), c) == expected).all()


def of_one_row(product, pairs, c=0.0) -> float:
    """Element [0, 0] where a has the first numbers of the pairs and b the second ones."""
    a, b = np.zeros((1, len(pairs), 2)), np.zeros((len(pairs), 16, 2))
    a[0], b[:, 0] = (
        [[p[0] for p in pair] for pair in pairs],
        [[p[1] for p in pair] for pair in pairs],
    )
    return product(0, bf16(a), bf16(b), np.full((1, 16), c, np.float32))[0, 0]


def test_rounding_and_the_order_of_sums(product):
    one, none, large = (1, 1), (0, 0), (2.0**12, 2.0**12)
    # Of the even ones: 2^24 + 1, to even, is 2^24, twice. Together with the odd ones 2^24 + 3, to even.
    assert of_one_row(product, [(large, one), (one, one), (one, one)]) == 2**24 + 4
    assert of_one_row(product, [(large, none), (one, none), (one, none)]) == 2**24
    assert of_one_row(product, [(one, none), (one, none), (large, none)]) == 2**24 + 2
    assert of_one_row(product, [(one, none), (one, none)], c=2.0**24) == 2**24 + 2


def test_subnormal_numbers_are_zero(product):
    tiny = 2.0**-130  # of operands, and of c
    assert of_one_row(product, [((tiny, 2.0**100), (0, 0))]) == 0
    assert of_one_row(product, [((0, 0), (0, 0))], c=tiny) == 0
    assert of_one_row(product, [((2.0**-65, 2.0**-65), (0, 0))]) == 0  # of results
    assert of_one_row(product, [((2.0**-63, 2.0**-63), (0, 0))]) == 2.0**-126
    assert of_one_row(product, [((2.0**-63, 2.0**-64), (2.0**-63, 2.0**-64))]) == 0


def test_infinities_and_nans(product):
    assert of_one_row(product, [((np.inf, 2), (1, 1))]) == np.inf
    assert np.isnan(of_one_row(product, [((np.inf, 0), (0, 0))]))
    assert np.isnan(of_one_row(product, [((np.inf, 1), (-np.inf, 1))]))


@pytest.mark.parametrize(("instruction", "what"), [(2, "shapes"), (3, "configuration")])
def test_what_a_processor_refuses_is_a_trap(instruction, what, product):
    program = (
        "import ctypes, sys; b = ctypes.create_string_buffer(1024); "
        "ctypes.CDLL(sys.argv[1]).product(int(sys.argv[2]), 5, 3, b, b, b); print('went on')"
    )
    command = [sys.executable, "-c", program, str(product.library), str(instruction)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGILL and done.stdout == "", what
