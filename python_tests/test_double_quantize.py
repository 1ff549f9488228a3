"""8-bit scales: offset = mean, the rest to the nearest of 256 values in blocks of 256."""

import pytest
import torch

import cases
import lowrank_kernels as lk
import tolerance
from lowrank_kernels import reference
from lowrank_kernels.codebooks import dynamic_code
from lowrank_kernels.schema import ops

SIZES = (0, 1, 2, 7, 15, 16, 17, 255, 256, 257, 511, 512, 513, 1000, 4096, 70_001)


def check(absmax):
    args = absmax, dynamic_code()
    expected = reference.double_quantize(*args)
    tolerance.assert_same_bits("double_quantize", ops.double_quantize(*args), expected)
    return expected


@pytest.mark.parametrize("size", SIZES)
def test_same_bits_as_the_reference(size, backend, subtests):
    for scale in (1.0, 1e-3, 1e30, 1e-30):
        with subtests.test(scale=scale):
            check((torch.rand(size) + 0.1) * scale)


@pytest.mark.parametrize("case", cases.FEW)
def test_same_bits_on_scales_of_a_weight(case, backend):
    check(ops.quantize_4bit(*cases.make("quantize_4bit", case))[1])


@pytest.mark.parametrize("size", [1, 100, 257, 512])
def test_equal_scales_are_kept_exactly(size, backend):
    """All differences are zero: the code of 0 in every place, and the offset alone is the scale."""
    quantized, nested_absmax, offset = check(torch.full((size,), 0.3))
    assert offset == torch.tensor(0.3) and not nested_absmax.any()
    assert not dynamic_code()[quantized.long()].any()


def test_scales_of_very_different_size(backend):
    check(10.0 ** torch.randint(-30, 30, (3000,)))
    check(torch.cat([torch.zeros(300), torch.ones(300), torch.zeros(1)]))


def test_ties_go_low(backend):
    """Symmetric data has mean 0; in a block whose largest is 1 the values are the midpoints themselves."""
    middle = (dynamic_code()[:-1] + dynamic_code()[1:]) / 2
    positive = middle[middle > 0][1:]
    below, above = (positive.nextafter(torch.tensor(end)) for end in (0.0, 2.0))
    for part in (positive, below, above):
        absmax = torch.cat([torch.tensor([1.0, -1.0]), part, -part])
        assert len(absmax) == 256
        _, nested_absmax, offset = check(absmax)
        assert nested_absmax == 1 and offset == 0


def test_reference_takes_the_nearest_code():
    absmax = torch.rand(1000) + 0.1
    quantized, nested_absmax, offset = reference.double_quantize(absmax, dynamic_code())
    scale = nested_absmax.repeat_interleave(256)[:1000].double()
    values = (absmax - offset).double() / scale
    distance = (values[:, None] - dynamic_code().double()).abs()
    chosen = distance.gather(1, quantized.long()[:, None])[:, 0]
    # The reference multiplies by the rounded 1/absmax: within 2 units in the last place of a midpoint
    # another code may be chosen.
    assert (chosen <= distance.amin(1) + 2**-22).all()
    assert offset == absmax.double().mean().float()


def test_the_error_of_double_quantized_scales(backend):
    """At most half of the widest gap of the dynamic code, of the spread of the scales."""
    weight = torch.randn(64, 4096)
    single, double = (lk.quantize_4bit(weight, double_quant=dq) for dq in (False, True))
    tolerance.assert_same_bits("packed", double.packed, single.packed)
    nested = (double.nested_absmax, double.nested_code, double.nested_offset)
    scales = reference.block_scales(double.absmax, *nested)
    gap = dynamic_code().diff().max()
    spread = double.nested_absmax.repeat_interleave(256)
    assert ((scales - single.absmax).abs() <= spread * gap / 2 * (1 + 1e-5)).all()
    assert double.bits_per_weight == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, abs=1e-3)


def test_not_finite_scales_are_an_error_for_the_caller():
    """quantize_4bit refuses them before; the operator itself must only stay within bounds."""
    for value in (torch.nan, torch.inf):
        quantized, _, _ = ops.double_quantize(torch.full((300,), value), dynamic_code())
        assert quantized.shape == (300,)


def test_within_one_step_of_bitsandbytes(backend):
    """Not the same bytes, and they cannot be: its mean is summed in float32 in an order of its own, and
    its CPU code looks values up in 65,536 bins. At most 1 % differ, each by one step.
    """
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes, the oracle, is not installed")
    weight = torch.randn(512, 2048)
    _, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    w = lk.quantize_4bit(weight)
    assert torch.equal(w.nested_code, state.state2.code)
    difference = (w.absmax.int() - state.absmax.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01
    assert torch.allclose(w.nested_absmax, state.state2.absmax, rtol=1e-5, atol=0)
    assert torch.allclose(w.nested_offset, state.offset, rtol=1e-6, atol=0)
