"""absmax of each block, nearest code of each element: the same bytes as the reference and as bitsandbytes."""

import itertools
import math

import pytest
import torch

import cases
import edges
import lowrank_kernels as lk
import tolerance
from conftest import each_case
from lowrank_kernels import reference
from lowrank_kernels.codebooks import BITSANDBYTES_CODES, BLOCKSIZES, QUANT_TYPES, code_of
from lowrank_kernels.schema import ops

DTYPES = cases.FACTORS["dtype"]


def check(weight, quant_type, blocksize):
    args = weight, code_of(quant_type), blocksize
    expected = reference.quantize_4bit(*args)
    tolerance.assert_same_bits("quantize_4bit", ops.quantize_4bit(*args), expected)
    return expected


@each_case(cases.LARGE[::3], cases.WEIGHTS, edges.weights)
def test_same_bits_as_the_reference(case, backend):
    args = cases.make("quantize_4bit", case)
    expected = reference.quantize_4bit(*args)
    tolerance.assert_same_bits("quantize_4bit", ops.quantize_4bit(*args), expected)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_reference_takes_the_nearest_code_and_ties_go_low(quant_type):
    """The definition in exact arithmetic, value by value, against the reference's search."""
    code = code_of(quant_type)
    values = torch.cat([torch.rand(3000) * 2 - 1, midpoints(quant_type), torch.zeros(1)])
    chosen = reference.midpoint_nearest(values, code).long()
    distance = (values.double()[:, None] - code.double()[None]).abs()
    assert torch.equal(distance.gather(1, chosen[:, None])[:, 0], distance.amin(1))
    tied = distance == distance.amin(1, keepdim=True)
    lowest = torch.where(tied, code.double()[None], math.inf).amin(1)
    assert torch.equal(code[chosen].double(), lowest)
    assert (tied.sum(1) > 1).sum() >= 5, "the data has no ties"


def midpoints(quant_type):
    """Values exactly halfway between two codes, where float32 has them."""
    code = code_of(quant_type).unique()
    middle = (code[:-1].double() + code[1:].double()) / 2
    return middle[middle == middle.float()].float()


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("absmax", [1.0, 0.25, 2.0**40, 2.0**-100])
def test_ties_and_their_neighbours(quant_type, absmax, backend):
    """A power of two as absmax keeps the ties exact."""
    middle = midpoints(quant_type)
    near = torch.cat([middle, middle.nextafter(middle + 1), middle.nextafter(middle - 1)])
    weight = torch.cat([near * absmax, -near * absmax])
    blocks = weight.split(31)
    weight = torch.cat(
        [torch.cat([b, b.new_zeros(31 - len(b)), b.new_full((1,), absmax)]) for b in blocks]
    )
    _, scales = check(weight.view(-1, 32), quant_type, 32)
    assert torch.equal(scales, torch.full_like(scales, absmax))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_the_padding_nibble_is_the_code_of_zero(quant_type, backend, subtests):
    zero = {"nf4": 7, "fp4": 0, "int4": 8}[quant_type]
    for size in (1, 3, 31, 33, 63, 65, 127, 1000):
        with subtests.test(size=size):
            packed, absmax = check(torch.randn(1, size), quant_type, 64)
            assert packed.shape == ((size + 1) // 2, 1) and absmax.shape == (math.ceil(size / 64),)
            assert size % 2 == 0 or int(packed[-1]) & 15 == zero


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_blocks(quant_type, dtype, backend):
    weight = torch.randn(8, 96).to(dtype)
    weight.view(-1, 32)[1::3] = 0
    weight.view(-1, 32)[2, ::2] = -0.0
    _, absmax = check(weight, quant_type, 32)
    assert (absmax == 0).sum() == 8
    w = lk.quantize_4bit(weight, quant_type, 32, double_quant=False)
    assert not w.dequantize().view(-1, 32)[1::3].any()
    everything = lk.quantize_4bit(torch.zeros(3, 50, dtype=dtype), quant_type)
    assert not everything.dequantize().any()


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_every_size(quant_type, dtype, backend):
    """Subnormals, the largest finite values, and blocks of very different scale side by side."""
    info = torch.finfo(dtype)
    scales = torch.tensor(
        [info.smallest_normal * info.eps, info.smallest_normal, 1e-3, 1.0, info.max]
    )
    weight = (torch.rand(5, 320) * 2 - 1) * scales.repeat(64)[None]
    weight = torch.cat([weight, scales.repeat_interleave(64)[None] * (torch.rand(1, 320) * 2 - 1)])
    check(weight.to(dtype), quant_type, 64)
    check(torch.full((1, 64), info.max, dtype=dtype), quant_type, 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_weight(dtype, backend):
    weight = torch.randn(66, 90).to(dtype)
    expected = ops.quantize_4bit(weight.T.contiguous(), code_of("nf4"), 64)
    tolerance.assert_same_bits("", ops.quantize_4bit(weight.T, code_of("nf4"), 64), expected)


# -- NaN and infinity ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_is_an_error_that_names_the_first(value, dtype, backend):
    N, K = 7, 37
    for flat, double_quant in itertools.product((0, 31, 40, N * K - 1), (False, True)):
        weight = torch.randn(N, K).to(dtype)
        weight.view(-1)[flat] = value
        weight.view(-1)[-1] = value
        index = (flat // K, flat % K)
        with pytest.raises(ValueError) as error:
            lk.quantize_4bit(weight, blocksize=32, double_quant=double_quant)
        assert f"weight: expected finite values, got {value}".replace("-nan", "nan") in str(
            error.value
        )
        assert f"at index {index}" in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_shows_in_the_absmax_of_its_block(value, dtype, backend):
    """At each place of a block, so in each lane of a vector, and in a short last block."""
    for blocksize in (32, 64, 256):
        weight = torch.randn(blocksize, blocksize)
        weight.diagonal().fill_(value)
        weight = weight.flatten()[: -blocksize // 2].to(dtype)
        weight[-1] = value
        _, absmax = ops.quantize_4bit(weight[None], code_of("nf4"), blocksize)
        assert not absmax.isfinite().any() and absmax.isnan().any() == math.isnan(value)


def test_largest_finite_values_are_no_error(backend):
    for dtype in DTYPES:
        weight = torch.full((2, 64), -torch.finfo(dtype).max, dtype=dtype)
        assert torch.equal(lk.quantize_4bit(weight, double_quant=False).dequantize(), weight)


# -- the function ----------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_error_is_at_most_half_a_step(quant_type, backend, subtests):
    """|w - dequantized| <= half of the widest gap between codes times absmax, and absmax is exact."""
    gap = code_of(quant_type).unique().diff().max()
    for blocksize in BLOCKSIZES:
        with subtests.test(blocksize=blocksize):
            weight = torch.randn(24, 512)
            w = lk.quantize_4bit(weight, quant_type, blocksize, double_quant=False)
            scale = w.absmax.repeat_interleave(blocksize)[: weight.numel()].view_as(weight)
            assert ((weight - w.dequantize()).abs() <= scale * gap / 2 * (1 + 1e-6)).all()
            assert torch.equal(w.absmax, weight.abs().view(-1, blocksize).amax(1))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(16, 64), (3, 5), (1, 1), (5, 7)])
def test_quant_storage_is_the_same_bytes(storage, shape, backend):
    weight = torch.randn(shape)
    plain = lk.quantize_4bit(weight)
    w = lk.quantize_4bit(weight, quant_storage=storage)
    assert w.packed.dtype == storage and w.packed.shape[1] == 1
    w.validate()
    held = w.packed.view(torch.uint8).flatten()
    assert torch.equal(held[: plain.packed.numel()], plain.packed.flatten())
    tolerance.assert_same_bits("W", w.dequantize(), plain.dequantize())


BAD_ARGUMENTS = {
    "weight: expected a torch.Tensor, got list": ([1.0],),
    "weight: expected float32, bfloat16 or float16, got torch.float64": (
        torch.zeros(2, 2).double(),
    ),
    "weight: expected float32, bfloat16 or float16, got torch.int8": (torch.zeros(2, 2).char(),),
    "weight: expected a matrix [N, K] or a stack [E, N, K], got shape (4,)": (torch.zeros(4),),
    "weight: expected a matrix [N, K] or a stack [E, N, K], got shape (1, 2, 3, 4)": (
        torch.zeros(1, 2, 3, 4),
    ),
    f"quant_type: expected one of {QUANT_TYPES}, got 'mxfp4', which is only loaded": (
        torch.zeros(2, 2),
        "mxfp4",
    ),
    f"quant_type: expected one of {QUANT_TYPES}, got 'int3'": (torch.zeros(2, 2), "int3"),
    f"quant_type: expected one of {QUANT_TYPES}, got ['nf4']": (torch.zeros(2, 2), ["nf4"]),
    f"blocksize: expected one of {BLOCKSIZES}, got 63": (torch.zeros(2, 2), "nf4", 63),
    f"blocksize: expected one of {BLOCKSIZES}, got 16": (torch.zeros(2, 2), "nf4", 16),
    f"blocksize: expected one of {BLOCKSIZES}, got 8192": (torch.zeros(2, 2), "nf4", 8192),
    f"blocksize: expected one of {BLOCKSIZES}, got -64": (torch.zeros(2, 2), "nf4", -64),
    f"blocksize: expected one of {BLOCKSIZES}, got 64.0": (torch.zeros(2, 2), "nf4", 64.0),
    f"blocksize: expected one of {BLOCKSIZES}, got True": (torch.zeros(2, 2), "nf4", True),
    f"blocksize: expected one of {BLOCKSIZES}, got '64'": (torch.zeros(2, 2), "nf4", "64"),
    "quant_storage: expected one of": (torch.zeros(2, 2), "nf4", 64, True, torch.int32),
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments(message):
    kind = (
        TypeError
        if message.startswith("weight: expected ") and "matrix" not in message
        else ValueError
    )
    with pytest.raises(kind) as error:
        lk.quantize_4bit(*BAD_ARGUMENTS[message])
    assert str(error.value).startswith(message)


@pytest.mark.large_memory(6)
def test_more_than_2_31_elements():
    """Two seconds on two AVX-512 cores; the input is one page of zeros, seen 2^20 times."""
    import numpy as np

    K = 2**14
    N = 2**31 // K + 2
    weight = torch.from_numpy(np.zeros((N, K), dtype=np.float16))
    weight[-2:] = torch.randn(2, K)
    packed, absmax = ops.quantize_4bit(weight, code_of("nf4"), 64)
    assert packed.numel() > 2**30 and not absmax[: -2 * K // 64].any()
    expected = reference.quantize_4bit(weight[-2:], code_of("nf4"), 64)
    actual = packed[-K:], absmax[-2 * K // 64 :]
    tolerance.assert_same_bits("last rows", actual, expected)
    assert packed[:-K].eq(0x77).all()


# -- symmetric integers ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_is_symmetric_quantization(dtype, backend):
    """By its formula in float64, without any table: q = round(7 w / absmax), w = absmax q / 7."""
    weight = torch.randn(40, 96).to(dtype)
    packed, absmax = ops.quantize_4bit(weight, code_of("int4"), 32)
    q = torch.stack((packed >> 4, packed & 15), -1).flatten().double() - 8
    scaled = 7 * weight.double().view(-1, 32) / absmax.double()[:, None]
    exact = torch.ceil(scaled.flatten() - 0.5)  # halves go to the lower integer
    near_half = ((scaled.flatten() + 0.5) % 1 - 0.5).abs() > 0.5 - 1e-5
    different = q.clamp(min=-7) != exact
    assert (different <= near_half).all() and near_half.sum() < len(q) / 100
    w = lk.quantize_4bit(weight, "int4", 32, double_quant=False)
    levels = (q.clamp(min=-7) / 7).float().double()
    expected = (levels.view(-1, 32) * absmax.double()[:, None]).float().view(40, 96)
    tolerance.assert_same_bits("dequantized", w.dequantize(torch.float32), expected)
    largest = weight.abs().view(-1, 32).amax(1).float()  # the largest of a block is exact
    assert torch.equal(w.dequantize(torch.float32).abs().view(-1, 32).amax(1), largest)


# -- bitsandbytes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", BITSANDBYTES_CODES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_same_bytes_as_bitsandbytes(quant_type, blocksize, backend, subtests):
    """Exact, but for a short last block: there its CPU code divides by absmax, elsewhere it multiplies
    by 1/absmax as we do everywhere, so a value next to a midpoint may fall to the other side; and it
    stores 1e-38 as the absmax of a short block of zeros, which random data has not.
    """
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes, the oracle, is not installed")
    for shape in ((16, 4096), (64, 96), (33, 63), (3, 5), (20, 1000), (9, 62)):
        with subtests.test(shape=shape):
            weight = torch.randn(shape).to(DTYPES[(blocksize // 32 + shape[0]) % 3])
            packed, absmax = ops.quantize_4bit(weight, code_of(quant_type), blocksize)
            theirs, state = bnb.functional.quantize_4bit(
                weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=False
            )
            tolerance.assert_same_bits("absmax", absmax, state.absmax)
            whole = weight.numel() // blocksize * blocksize // 2
            assert packed.shape == theirs.shape and whole + blocksize // 2 >= len(packed)
            tolerance.assert_same_bits("whole blocks", packed[:whole], theirs[:whole])
            if whole < len(packed):
                flat, scale = weight.flatten()[2 * whole :].float(), state.absmax[-1]
                padded = torch.nn.functional.pad(flat / scale, (0, len(flat) % 2))
                nibbles = reference.midpoint_nearest(padded, code_of(quant_type))
                divided = ((nibbles[::2] << 4) | nibbles[1::2])[:, None]
                tolerance.assert_same_bits("theirs, divided", theirs[whole:], divided)
