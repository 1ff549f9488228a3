"""Stacked experts on the CUDA kernels: sizes on each side of a tile (64 rows x 64 columns, 16 deep), and offsets, which
stay on the device and are not checked there.
"""

import pytest
import torch

import cases
import conftest
import tolerance
from cases import BF16, F16, F32, Case
from lowrank_kernels.schema import ops

KERNELS = [k for k in conftest.KERNELS if k in ("emulator", "cuda")]
FORWARD, BACKWARD = "grouped_lora_linear_4bit", "grouped_lora_linear_4bit_backward"
FACTORS = {
    "rows": ((0, 1, 63, 0), (64, 65, 0, 127), (128, 1, 1, 1), (0, 0, 0, 129)),
    "rest": (0, 1, 64, 65),
    "N": (1, 63, 64, 65, 130),
    "K": (2, 15, 16, 17, 64, 130),
    "R": (1, 15, 16, 17, 65),
    "blocksize": (32, 64, 256),
    "double_quant": (True, False),
    "dtype": (F32, BF16, F16),
    "adapter": (F32, BF16, F16),
    "bias": (None, F32, BF16, F16),
}
PROBLEMS = cases.pairwise(FACTORS)
# What a device may find in offsets, of 70 rows, and what it reads them as.
LIES = [
    ((-(2**31), 64, 64, 70), (0, 64, 64, 70)),
    ((3, 68, 2**31 - 1, 71), (3, 68, 70, 70)),
    ((66, 5, 69, -1), (66, 66, 69, 69)),
    ((2**31 - 1, 0, 70, 0), (70, 70, 70, 70)),
]


@pytest.fixture(params=KERNELS, autouse=True)
def backend(request):
    with conftest.entered(request.param) as name:
        yield name


def arguments(op, case, offsets):
    """Of forward or backward, the offsets in their place."""
    args = list(cases.make(op, case))
    at = 12 if op == BACKWARD else 10
    args[at] = torch.tensor(offsets, dtype=torch.int32)
    return tuple(args)


def problem(row):
    """The case, and the offsets of its experts; after their rows come ``rest`` that belong to none."""
    row = dict(row)
    rows, rest = row.pop("rows"), row.pop("rest")
    offsets = [sum(rows[: e + 1]) for e in range(cases.EXPERTS)]
    return Case(sum(rows) + rest, scaling=-0.5, **row), offsets


@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
@pytest.mark.parametrize("row", PROBLEMS, ids=lambda row: "{}-{}".format(*problem(row)))
def test_edges_of_the_tiles(op, row):
    case, offsets = problem(row)
    args = arguments(op, case, offsets)
    outputs = getattr(ops, op)(*args)
    tolerance.check(op, args, outputs)
    assert not outputs[0][offsets[-1] :].any()
    tolerance.assert_same_bits(op, getattr(ops, op)(*args), outputs)


@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
@pytest.mark.parametrize(("offsets", "read_as"), LIES)
@pytest.mark.parametrize("N", [33, 34])  # one of them is a transposed stack
def test_offsets_that_descend_or_lead_out_of_x_are_cut(op, offsets, read_as, N):
    """Each row is computed once, and nothing beyond x is read or written: emulator-asan runs this, too."""
    case = Case(70, N, 130, "nf4", 32, True, BF16, F32, 5)
    args, honest = (arguments(op, case, o) for o in (offsets, read_as))
    honest = tuple(h if i == (12 if op == BACKWARD else 10) else a
                   for i, (a, h) in enumerate(zip(args, honest, strict=True)))  # fmt: skip
    tolerance.assert_same_bits(op, getattr(ops, op)(*args), getattr(ops, op)(*honest))


def test_the_bits_of_a_row_do_not_depend_on_the_others(backend):
    """All row counts are one family: cases.family tells so, and the tiles of an expert begin at its first row."""
    case = Case(200, 70, 130, "nf4", 32, True, BF16, F32, 20)
    args = arguments(FORWARD, case, (10, 90, 90, 180))
    y, s = ops.grouped_lora_linear_4bit(*args)
    for begin, end in ((10, 11), (13, 80), (26, 90)):
        alone = list(arguments(FORWARD, case, (0, end - begin, end - begin, end - begin)))
        alone = (args[0][begin:end], *args[1:10], alone[10], *args[11:])
        expected = y[begin:end], s[begin:end]
        tolerance.assert_same_bits("y, S", ops.grouped_lora_linear_4bit(*alone), expected)
