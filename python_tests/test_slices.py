"""Weight4bit.narrow: the values of the whole weight, bit for bit."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import cases
import tolerance
from lowrank_kernels import Weight4bit, reference

SHAPES = [(70, 96), (64, 33), (9, 512), (3, 4096), (130, 65), (1, 320), (2048, 64), (40, 544)]


def weights():
    """Each format with each shape; every third block size of the eight that there are."""
    formats = [
        ("nf4", False, torch.uint8),
        ("fp4", True, torch.bfloat16),
        ("nf4", True, torch.float32),
    ]
    for i, (N, K) in enumerate(SHAPES):
        for j, (quant_type, double_quant, storage) in enumerate(formats):
            blocksize = cases.BLOCKSIZES[(i + 3 * j) % 8]
            yield cases.Case(0, N, K, quant_type, blocksize, double_quant, storage=storage)
    yield cases.Case(0, 2048, 64, "nf4", 64, True)  # several nested blocks


def dense(w: Weight4bit) -> torch.Tensor:
    return reference.dequantize_4bit(*w.op_args())


def cuts(size: int, multiple: int):
    """(start, length) pairs at every kind of place."""
    starts = sorted({0, multiple, size // multiple // 2 * multiple, size // multiple * multiple})
    for start in starts:
        if start <= size:
            lengths = {
                0,
                min(multiple, size - start),
                (size - start) // multiple * multiple,
                size - start,
            }
            yield from ((start, length) for length in sorted(lengths))


@pytest.mark.parametrize("case", list(weights()))
def test_rows(case):
    w = cases.random_weight(case)
    multiple = 32 // math.gcd(case.K, 32)
    whole, seen = dense(w), 0
    for start, length in cuts(case.N, multiple):
        for size in {length, max(0, length - 1)}:  # rows may end anywhere
            part = w.narrow(0, start, size)
            part.validate("part")
            tolerance.assert_same_bits("rows", dense(part), whole[start : start + size])
            seen += 1
    assert seen >= 3


@pytest.mark.parametrize("case", [case for case in weights() if case.K % 32 == 0])
def test_columns(case):
    w = cases.random_weight(case)
    whole = dense(w)
    for start, length in cuts(case.K, 32):
        part = w.narrow(1, start, length)
        part.validate("part")
        tolerance.assert_same_bits("columns", dense(part), whole[:, start : start + length])


@pytest.mark.parametrize("double_quant", [False, True])
def test_settings_of_a_slice(double_quant):
    w = cases.random_weight(cases.Case(0, 1024, 128, "fp4", 64, double_quant, cases.BF16))
    top = w.narrow(0, 0, 100)
    assert (top.blocksize, top.double_quant, top.dtype, top.quant_type) == (
        64,
        double_quant,
        cases.BF16,
        "fp4",
    )
    assert w.narrow(0, 128, 300).double_quant == double_quant  # from the second nested block on
    assert not w.narrow(0, 64, 300).double_quant
    assert w.narrow(1, 64, 64).blocksize == 64 and w.narrow(1, 32, 64).blocksize == 32
    assert w.narrow(1, 0, 128).double_quant == double_quant  # all of it
    assert top.packed.untyped_storage().nbytes() == 100 * 64  # nothing of the whole is kept
    again = w.narrow(0, 0, 1024)
    for name, tensor in w.tensors().items():
        tolerance.assert_same_bits(name, getattr(again, name), tensor)
        if name in ("packed", "absmax"):
            assert getattr(again, name).data_ptr() != tensor.data_ptr()


def test_the_operators_run_on_a_slice(backend):
    case = cases.Case(5, 64, 256, "nf4", 64, True, cases.BF16)
    w, x = cases.random_weight(case), cases.random_tensor(5, 96, dtype=cases.BF16)
    args = (x, *w.narrow(1, 32, 96).op_args(), None)
    tolerance.check("linear_4bit", args, cases.run("linear_4bit", args))


def test_orientation_and_meta():
    w = cases.random_weight(cases.Case(0, 8, 64, storage=cases.BF16))
    row = dataclasses.replace(w, packed=w.packed.view(1, -1))
    assert w.narrow(0, 2, 4).packed.shape == (64, 1) and row.narrow(0, 2, 4).packed.shape == (1, 64)
    meta = cases.random_weight(cases.Case(0, 1024, 128, double_quant=True)).to("meta")
    part = meta.narrow(0, 128, 128)
    assert part.double_quant and part.packed.is_meta and part.packed.shape == (128 * 64, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 1.0, 2), TypeError, r"dim, start, length: expected integers, got \(0, 1.0, 2\)"),
        ((2, 0, 1), IndexError, r"dim: expected 0 \(rows\) or 1 \(columns\), got 2"),
        ((0, 60, 11), IndexError, "start, length: expected a part of 70 rows, got 11 from 60 on"),
        ((1, -1, 2), IndexError, "expected a part of 48 columns, got 2 from -1 on"),
        ((0, 1, 2), ValueError, "start: expected a multiple of 2 for rows of 48 columns, got 1"),
        (
            (1, 0, 32),
            ValueError,
            "dim: expected 0, since columns can be cut only where K is a mult",
        ),
    ],
)
def test_what_cannot_be_cut(arguments, error, message):
    w = cases.random_weight(cases.Case(0, 70, 48))
    with pytest.raises(error, match=message):
        w.narrow(*arguments)


def test_columns_that_cut_32():
    w = cases.random_weight(cases.Case(0, 70, 96))
    with pytest.raises(
        ValueError, match="start, length: expected multiples of 32 for columns, got 16, 32"
    ):
        w.narrow(1, 16, 32)
