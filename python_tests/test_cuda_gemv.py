"""The gemv kernels of the CUDA backend (few rows, 16-bit activations), beyond what the suites of the
operators reach: every tile and its edges, splits of the columns, and bits that do not depend on the rest.

On the emulator, where the order of a block's threads can be chosen.
"""

import pytest
import torch

import cases
import tolerance
from cases import BF16, F16, F32, Case
from conftest import KERNELS, entered
from emulator import thread_order
from lowrank_kernels.schema import ops

pytestmark = pytest.mark.skipif(
    "emulator" not in KERNELS, reason="LOWRANK_BACKEND or LOWRANK_TEST_DEVICE is set"
)
OP = "lora_linear_4bit"
# Up to so many rows share one size of tile.
TILES = (8, 16, 32, 64)


@pytest.fixture(autouse=True)
def on_the_emulator():
    with entered("emulator"):
        yield


def run(case: Case, op: str = OP):
    args = cases.make(op, case)
    outputs = getattr(ops, op)(*args)
    tolerance.check(op, args, outputs)
    return args, outputs


def rows(args: tuple, selection) -> tuple:
    return args[0][selection].contiguous(), *args[1:]


# -- shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("M", [1, 7, 8, 9, 16, 17, 32, 33, 64, 65])
@pytest.mark.parametrize("N", [1, 15, 16, 17, 33, 65])
def test_edges_of_the_tiles(M, N):
    run(Case(M, N, 192, dtype=BF16 if N % 2 else F16, double_quant=M % 2 == 0), "linear_4bit")


@pytest.mark.parametrize("K", [64, 128, 192, 256, 320, 960, 1024, 1088, 2304])
@pytest.mark.parametrize("M", [1, 16, 33])
def test_lengths_of_the_slices(M, K):
    """Fewer chunks of 256 columns than slices, part of a chunk, rings that turn more than once."""
    run(Case(M, 33, K, "fp4", 64, M == 1, F16 if K % 128 else BF16, F32), "linear_4bit")


@pytest.mark.parametrize("blocksize", [64, 128, 256, 4096])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_block_sizes(blocksize, double_quant, dtype):
    K = max(blocksize, 384 if blocksize < 256 else 512)
    run(Case(3, 21, K, "nf4", blocksize, double_quant, dtype, dtype), "linear_4bit")


@pytest.mark.parametrize("M", [2, 8, 12])
def test_tall_tiles(M):
    """Enough rows of weight for tiles of 64 on every multiprocessor of the device."""
    run(Case(M, 132 * 64 - 63, 64, "nf4", 64, True, BF16, BF16, R=3), OP)


@pytest.mark.parametrize("M", [1, 5, 13, 40])
def test_columns_cut_for_several_blocks(M):
    args, outputs = run(Case(M, 35, 8192 + 64, "nf4", 64, True, BF16, F32, R=12, dropout_p=0.25))
    with thread_order(2, 5):
        tolerance.assert_same_bits("outputs", getattr(ops, OP)(*args), outputs)


@pytest.mark.parametrize("R", [1, 8, 12, 33, 64])
@pytest.mark.parametrize("adapter", [F32, BF16, F16])
@pytest.mark.parametrize("M", [1, 6, 19])
def test_adapters(R, adapter, M):
    run(Case(M, 41, 320, dtype=BF16, R=R, adapter=adapter, bias=adapter, dropout_p=0.3 * (R % 2)))


def test_adapters_of_any_stride():
    case = Case(5, 37, 256, dtype=F16, R=6, adapter=BF16, dropout_p=0.5)
    args = list(cases.make(OP, case))
    expected = getattr(ops, OP)(*args)
    for i in (10, 11):
        wide = torch.zeros(args[i].shape[0], args[i].shape[1] + 3, dtype=BF16)
        wide[:, 1:-2] = args[i]
        args[i] = wide[:, 1:-2]
    tolerance.assert_same_bits("outputs", getattr(ops, OP)(*args), expected)


# -- bits ------------------------------------------------------------------------------------------

BITS = [
    Case(64, 70, 1344, "nf4", 64, True, BF16, BF16, 12, F32, dropout_p=0.25),
    Case(64, 33, 512, "fp4", 128, False, F16, F32, 40, F16),
    Case(64, 17, 8192, "nf4", 4096, True, BF16, None, 8, BF16),
]


@pytest.mark.parametrize("case", BITS)
def test_bits_do_not_depend_on_the_order_of_threads(case):
    for M in (3, 12, 20, 64):
        args = rows(cases.make(OP, case), slice(M))
        expected = getattr(ops, OP)(*args)
        for kind, seed in ((1, 0), (2, 1), (2, 2)):
            with thread_order(kind, seed):
                tolerance.assert_same_bits("outputs", getattr(ops, OP)(*args), expected)


@pytest.mark.parametrize("case", BITS)
def test_bits_of_a_row_do_not_depend_on_the_batch(case):
    """Over all sizes of tile; with dropout only the leading rows, since the mask is of the position."""
    args = cases.make(OP, case)
    y, s = getattr(ops, OP)(*args)
    for M in (1, 2, 8, 9, 17, 33, 63):
        outputs = getattr(ops, OP)(*rows(args, slice(M)))
        tolerance.assert_same_bits("outputs", outputs, (y[:M], s[:M]))
    if not case.dropout_p:
        last = getattr(ops, OP)(*rows(args, slice(50, 51)))
        tolerance.assert_same_bits("outputs", last, (y[50:51], s[50:51]))


@pytest.mark.parametrize("M", [3, 11, 20, 64])
def test_bits_of_an_output_do_not_depend_on_the_other_rows_of_the_weight(M):
    """Short and tall tiles."""
    case = Case(M, 132 * 64, 64, dtype=F16)
    args = cases.make("linear_4bit", case)
    y = ops.linear_4bit(*args)
    x, packed, absmax, *rest = args
    first = (x, packed.view(-1)[: 40 * 32], absmax[:40], *rest)
    first = tuple(40 if isinstance(a, int) and a == case.N else a for a in first)
    tolerance.assert_same_bits("y", ops.linear_4bit(*first), y[:, :40])


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("M", [4, 16, 30, 61])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_infinities_stay_in_their_row(M, value):
    """K = 320 ends within a chunk: what is past the end must not turn an infinity into a NaN."""
    for column in (0, 255, 256, 319):
        args = cases.make("linear_4bit", Case(M, 19, 320, dtype=BF16))
        args[0][M - 1, column] = value
        y = ops.linear_4bit(*args)
        tolerance.check("linear_4bit", args, y)
        assert y[: M - 1].isfinite().all()


def test_every_byte():
    """Each of the 256 bytes at each place of the 32 of a block, against the exact weight."""
    packed = torch.arange(256, dtype=torch.uint8).repeat_interleave(32)
    args = list(cases.make("linear_4bit", Case(64, 256, 64, dtype=F16)))
    args[0], args[1] = torch.eye(64, dtype=F16), packed
    y = ops.linear_4bit(*args)
    code, scale = args[3].half().float(), args[2]
    nibbles = torch.stack((packed >> 4, packed & 15), 1).reshape(256, 64).long()
    assert torch.equal(y, (code[nibbles] * scale[:, None]).half().T)


# -- what is left to other kernels -----------------------------------------------------------------


def unaligned(t: torch.Tensor) -> torch.Tensor:
    """The same values one element further in memory than the allocator's alignment."""
    storage = torch.empty(t.numel() + 1, dtype=t.dtype)
    storage[1:] = t.flatten()
    return storage[1:].view(t.shape)


@pytest.mark.parametrize("what", ["x", "packed", "stride of x", "K", "blocksize", "straddling"])
def test_what_the_kernel_does_not_take(what):
    case = Case(3, 18, 192, dtype=BF16, bias=F32)
    if what == "K":
        case = case._replace(K=96, blocksize=32)
    if what == "blocksize":
        case = case._replace(blocksize=32)
    if what == "straddling":
        case = case._replace(blocksize=128)
    args = list(cases.make(OP, case))
    if what == "x":
        args[0] = unaligned(args[0])
    if what == "packed":
        args[1] = unaligned(args[1].flatten())
    if what == "stride of x":
        wide = torch.zeros(3, 193, dtype=BF16)
        wide[:, :192] = args[0]
        args[0] = wide[:, :192]
    tolerance.check(OP, tuple(args), getattr(ops, OP)(*args))
