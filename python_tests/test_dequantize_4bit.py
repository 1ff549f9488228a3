"""W[n, k] = code[nibble] * scale, rounded once: the same bytes as the reference and as bitsandbytes."""

import itertools

import pytest
import torch

import cases
import edges
import lowrank_kernels as lk
import tolerance
from conftest import each_case
from lowrank_kernels import reference
from lowrank_kernels.schema import ops


def reference_bytes(args):
    return reference.dequantize_4bit(*args).to(args[-1])


@each_case(cases.LARGE[::3], cases.WEIGHTS, edges.weights)
def test_same_bits_as_the_reference(case, backend):
    args = cases.make("dequantize_4bit", case)
    tolerance.assert_same_bits("W", ops.dequantize_4bit(*args), reference_bytes(args))


@pytest.mark.parametrize("dtype", cases.FACTORS["dtype"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_every_nibble_at_every_position(dtype, double_quant, backend):
    """All 256 bytes in turn: each of the 16 codes in the high and in the low nibble."""
    case = cases.Case(N=16, K=128, dtype=dtype, double_quant=double_quant)
    _, *rest = cases.make("dequantize_4bit", case)
    args = torch.arange(1024).to(torch.uint8)[:, None], *rest
    tolerance.assert_same_bits("W", ops.dequantize_4bit(*args), reference_bytes(args))


@pytest.mark.parametrize("dtype", cases.FACTORS["dtype"])
def test_rounds_to_nearest_even_once(dtype, backend):
    """Scales at, just above and just below ties of the output dtype; subnormal, overflowing, NaN."""
    ulp = torch.finfo(dtype).eps
    ties = torch.tensor([1 + ulp / 2, 1 + 3 * ulp / 2, 2 - ulp / 2])
    specials = torch.tensor(
        [1e-40, 1e-45, 6e-8, 65504.0, 65519.0, 65520.0, 3.4e38, torch.inf, torch.nan]
    )
    scales = torch.cat([ties, ties.nextafter(ties + 1), ties.nextafter(ties - 1), -ties, specials])
    n = len(scales)
    packed = torch.arange(16 * n).to(torch.uint8)[:, None]
    code = lk.formats.code_of("nf4")
    args = packed, scales, code, None, None, None, n, 32, 32, dtype
    actual, expected = ops.dequantize_4bit(*args), reference_bytes(args)
    tolerance.assert_same_bits("NaNs", actual.isnan(), expected.isnan())
    tolerance.assert_same_bits("W", actual.nan_to_num(0.0), expected.nan_to_num(0.0))


@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 0)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_no_elements(shape, double_quant, backend):
    w = lk.quantize_4bit(torch.zeros(shape), double_quant=double_quant)
    tolerance.assert_same_bits("W", w.dequantize(), torch.zeros(shape))


def test_double_quantized_scales_are_rounded_twice(backend):
    """Product, then sum. With one rounding (FMA) about a third of these scales would differ."""
    case = cases.Case(N=64, K=2048, blocksize=32, double_quant=True)
    args = cases.make("dequantize_4bit", case)
    absmax, code, nested_absmax, nested_code, offset = args[1:6]
    product = nested_code[absmax.long()].double() * nested_absmax.repeat_interleave(256).double()
    fused = (product + offset.double()).float()
    twice = product.float() + offset
    assert (fused != twice).sum() > 100, "the data cannot tell the two apart"
    expected = (code[15] * twice)[:, None]
    everything_is_code_15 = torch.full_like(args[0], 255)
    w = ops.dequantize_4bit(everything_is_code_15, *args[1:])
    assert torch.equal(w.view(-1, 32), expected.expand(-1, 32))


def test_dtype_that_is_not_floating_is_an_error(any_backend):
    w = lk.quantize_4bit(torch.zeros(2, 64))
    with pytest.raises(TypeError) as error:
        w.dequantize(torch.int8)
    expected = "dtype: expected float32, bfloat16 or float16, got torch.int8"
    assert str(error.value) == expected


@pytest.mark.large_memory(5)
def test_more_than_2_31_elements(large_weight):
    """Three seconds on two AVX-512 cores."""
    w, tail = large_weight
    dense = w.dequantize(torch.bfloat16)
    expected = tail.dequantize(torch.bfloat16)
    tolerance.assert_same_bits("last rows", dense[-tail.shape[0] :], expected)
    assert not dense[: -tail.shape[0]].any()


# -- bitsandbytes ----------------------------------------------------------------------------------

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


@pytest.fixture
def bnb():
    reason = "bitsandbytes, the format's oracle, is not installed"
    return pytest.importorskip("bitsandbytes", reason=reason).functional


def bitsandbytes_pair(bnb, shape, quant_type, blocksize, double_quant=False):
    """A random weight as bitsandbytes quantized it: (packed, QuantState) and the same for us."""
    packed, state = bnb.quantize_4bit(
        torch.randn(shape),
        blocksize=blocksize,
        quant_type=quant_type,
        compress_statistics=double_quant,
    )
    entries = {f"w.{k}": v for k, v in state.as_dict(packed=True).items()}
    return packed, state, lk.Weight4bit.from_bitsandbytes({"w": packed} | entries, "w")


def has_the_defect(shape, blocksize):
    """bitsandbytes 0.50.2, C++ for AVX-512: scales of the wrong blocks when blocks cross rows.

    Only its vector code, which takes whole rows of 32 values: other K go through its scalar code, and
    blocks of 2048 and more through its Python. One block for everything has nothing to confuse.
    """
    N, K = shape
    return AVX512 and K % 32 == 0 and K % blocksize != 0 and blocksize < N * K and blocksize < 2048


SHAPES = [(16, 4096), (17, 64), (3, 5), (33, 63), (64, 128), (5, 2048), (2, 62), (20, 96), (7, 1000), (1, 1),
          (9, 160), (3, 1056)]  # fmt: skip


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", lk.formats.BLOCKSIZES)
def test_same_bits_as_bitsandbytes(quant_type, blocksize, bnb, backend, subtests):
    for shape, double_quant in itertools.product(SHAPES, (False, True)):
        with subtests.test(shape=shape, double_quant=double_quant):
            compare_with_bitsandbytes(bnb, shape, quant_type, blocksize, double_quant)


def compare_with_bitsandbytes(bnb, shape, quant_type, blocksize, double_quant):
    packed, state, w = bitsandbytes_pair(bnb, shape, quant_type, blocksize, double_quant)
    for dtype in cases.FACTORS["dtype"]:
        actual = w.dequantize(dtype)
        if has_the_defect(shape, blocksize):
            expected = reference_bytes((*w.op_args(), dtype))
        else:
            state.dtype = dtype
            with torch.compiler.set_stance("force_eager"):  # it compiles its Python for each shape
                expected = bnb.dequantize_4bit(packed, state)
        if quant_type == "fp4":
            # The sign of zero: the nibble 8 is +0.0 in bitsandbytes' table, so in our and its vector
            # code, and -0.0 in its scalar code. Adding 0.0 makes -0.0 to 0.0 and changes nothing else.
            actual, expected = actual + 0.0, expected + 0.0
        tolerance.assert_same_bits(f"W in {dtype}", actual, expected)


@pytest.mark.skipif(not AVX512, reason="bitsandbytes' defect is in its AVX-512 code")
@pytest.mark.parametrize("shape", [s for s in SHAPES if has_the_defect(s, 64)])
def test_the_defect_of_bitsandbytes_is_still_there(shape, bnb):
    """When this fails, bitsandbytes has been repaired, and ``has_the_defect`` can go."""
    packed, state, w = bitsandbytes_pair(bnb, shape, "nf4", 64)
    theirs = bnb.dequantize_4bit(packed, state)
    assert not torch.equal(theirs, reference_bytes((*w.op_args(), torch.float32)))


@pytest.mark.parametrize(
    ("N", "K", "message"),
    [
        (2**62, 4, r"N: expected a size (of 0..2.48|below 2.31), got 4611686018427387904"),
        (
            2**40,
            2**40,
            r"N, K: expected sizes whose product fits 64 bits|N: expected a size below 2.31",
        ),
        (
            2**32,
            2**31,
            r"N \* K: expected a size of 0..2.48, got 9223372036854775808|product fits|below 2.31",
        ),
        (-1, 64, r"N: expected a size (of 0..2.48|below 2.31), got -1"),
    ],
)
def test_sizes_that_overflow_are_refused(N, K, message):
    """A product that wraps around would agree with tensors of a few bytes."""
    empty, code = torch.zeros(0, dtype=torch.uint8), torch.zeros(16)
    with pytest.raises(RuntimeError, match=message):
        ops.dequantize_4bit(empty, torch.zeros(0), code, None, None, None, N, K, 64, torch.float32)
