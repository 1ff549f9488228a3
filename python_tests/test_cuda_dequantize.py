"""Rectangles of a weight, as the CUDA backend decodes them for the dense library: the same bits as the whole.

The operators ask for rectangles of large weights only, so the library is called directly here.
"""

import ctypes

import pytest
import torch

import cases
import conftest
import tolerance
from emulator import Weight4, launcher
from lowrank_kernels import reference

pytestmark = pytest.mark.skipif("emulator" not in conftest.KERNELS, reason="needs the emulator")


def structure(**fields):
    members = {"_fields_": list(fields.items())}
    return type("Structure", (ctypes.Structure,), members)


MutMatrix = structure(
    data=ctypes.c_void_p,
    dtype=ctypes.c_int,
    **dict.fromkeys(("rows", "cols", "stride"), ctypes.c_int64),
)
Launch = structure(device=ctypes.c_int, stream=ctypes.c_void_p, workspace=ctypes.c_void_p)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # in the order of lk::DType


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


def dequantize(args, row, column, out):
    packed, absmax, code, nested_absmax, nested_code, nested_offset, N, K, blocksize, _ = args
    nested = nested_absmax is not None
    weight = Weight4(
        address(packed),
        *((None, address(absmax)) if nested else (address(absmax), None)),
        *map(address, (nested_absmax, nested_code, nested_offset, code)),
        N, K, blocksize.bit_length() - 1,
    )  # fmt: skip
    matrix = MutMatrix(out.data_ptr(), DTYPES.index(out.dtype), *out.shape, out.stride(0))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    run = launcher("dequantize", ctypes.c_int, pointer, integer, integer, pointer, pointer)
    by = ctypes.byref
    assert run(by(weight), row, column, by(matrix), by(Launch())) == 0


# The piece of a warp is 512 elements of float32, 1024 of 16 bits: less than one, and more than two.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("N", "K", "blocksize"), [(7, 2176, 64), (3, 1056, 32), (5, 96, 4096), (9, 40, 32), (4, 33, 64)]
)
def test_rectangles(N, K, blocksize, double_quant, dtype):
    case = cases.Case(N=N, K=K, blocksize=blocksize, double_quant=double_quant, dtype=dtype)
    args = cases.make("dequantize_4bit", case)
    whole = reference.dequantize_4bit(*args).to(dtype)
    for row, rows, column, cols in [
        (0, N, 0, K), (1, 2, 0, K), (2, 1, 8, K - 8), (0, N, K // 32 * 16, K // 2),
        (N - 1, 1, 0, 1), (0, 2, 16, 16), (1, 2, 3, 5),
    ]:  # fmt: skip
        for extra in (0, 8, 3):
            wide = torch.full((rows, cols + extra), 7.0, dtype=dtype)
            cols_out = min(cols, K - column)
            dequantize(args, row, column, wide[:, :cols_out])
            expected = whole[row : row + rows, column : column + cols_out]
            tolerance.assert_same_bits("W", wide[:, :cols_out], expected)
            assert (wide[:, cols_out:] == 7.0).all(), "wrote past its columns"
