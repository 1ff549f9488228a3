"""The CUDA kernels that multiply by tiles of decoded weights: what the general tests do not reach.

Edges of the tile shapes (16, 64 and 128 rows, 128 outputs, steps of 64), splits of the depth, ragged rows
of dy, synchronisation under other orders of the threads, bits of a row among others.
"""

import ctypes

import pytest
import torch

import cases
import conftest
import tolerance
from cases import BF16, F16, F32
from emulator import Weight4, launcher, thread_order
from lowrank_kernels.schema import ops

pytestmark = pytest.mark.skipif(
    "emulator" not in conftest.KERNELS, reason="only the reference is tested"
)
FORWARD, BACKWARD = "lora_linear_4bit", "lora_linear_4bit_backward"
DX = "linear_4bit_dx"


@pytest.fixture(autouse=True)
def on_the_emulator():
    with conftest.entered("emulator") as name:
        yield name


def check(op, args, c=tolerance.C_ZERO_MEAN):
    outputs = getattr(ops, op)(*args)
    tolerance.check(op, args, outputs, c)
    return outputs


def largest_block(K, blocksize):
    """The block size, or the largest power of two below it that divides K."""
    return min(blocksize, K & -K)


# -- edges -----------------------------------------------------------------------------------------
FACTORS = {
    "M": (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200),
    "N": (1, 7, 8, 127, 128, 129, 300),
    "K": (32, 64, 96, 320, 1024),
    "blocksize": (32, 64, 128, 256, 512, 1024),
    "quant_type": ("nf4", "fp4"),
    "double_quant": (False, True),
    "dtype": (BF16, F16),
    "R": (1, 8, 12, 64),
    "adapter": (F32, BF16, F16),
    "dropout_p": (0.0, 0.25),
    "bias": (None, F32, BF16, F16),
}
EDGES = [
    cases.Case(**row | {"blocksize": largest_block(row["K"], row["blocksize"])})
    for row in cases.pairwise(FACTORS)
]


@pytest.mark.parametrize("case", EDGES)
def test_forward(case):
    check(FORWARD, cases.make(FORWARD, case))


@pytest.mark.parametrize("case", EDGES)
def test_backward(case):
    args = list(cases.make(BACKWARD, case))
    check_dx(args, aligned_rows(args[0]))


def aligned_rows(dy):
    """dy as a view of rows that begin at multiples of 16 bytes, between them NaNs."""
    M, N = dy.shape
    wide = torch.full((M, (N + 7) // 8 * 8 + 8), torch.nan, dtype=dy.dtype)
    wide[:, :N] = dy
    return wide[:, :N]


def check_dx(args, dy):
    """dx alone, of the backward operator, with this dy."""
    args = (dy, *args[1:-4], True, False, False, False)
    dx = ops.lora_linear_4bit_backward(*args)[0]
    values, magnitudes = tolerance.evaluate(BACKWARD, (*args[:-4], True, True, True, False))
    rows = dy.double().abs().sum(1, keepdim=True)
    extra = tolerance.U_OUT[dy.dtype] * magnitudes[0] + 2.0**-25 * rows
    tolerance.assert_close("dx", dx, values[0], magnitudes[0], extra=extra)
    return dx


@pytest.mark.parametrize("blocksize", [2048, 4096])
@pytest.mark.parametrize("double_quant", [False, True])
def test_large_blocks(blocksize, double_quant):
    case = cases.Case(18, 9, 4096, "nf4", blocksize, double_quant, BF16)
    check("linear_4bit", cases.make("linear_4bit", case))
    dy, *weight = cases.make(DX, case)
    check(DX, (aligned_rows(dy), *weight))


@pytest.mark.parametrize("op", [FORWARD, "lora_linear"])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_strided_operands(op, dtype):
    """Rows of x, A and B that are part of longer ones; x at multiples of 16 bytes and not."""
    case = cases.Case(20, 130, 128, dtype=dtype, adapter=dtype, R=12)
    args = list(cases.make(op, case))
    expected = getattr(ops, op)(*args)[0]
    for shift in (8, 1):
        strided = list(args)
        for i in (0, -6, -5):  # x, A, B
            wide = torch.full((args[i].shape[0], args[i].shape[1] + 16), torch.nan)
            strided[i] = wide.to(args[i].dtype)[:, shift : shift + args[i].shape[1]]
            strided[i].copy_(args[i])
        y = check(op, tuple(strided))[0]
        if shift == 8:
            tolerance.assert_same_bits("y", y, expected)


# -- infinities and NaNs ---------------------------------------------------------------------------
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("M", [10, 40, 70])
@pytest.mark.parametrize("column", [0, 63, 64, -1])
def test_infinities_spread_as_in_ieee(value, M, column):
    """The last step of the depth is half empty: its zeros must meet no infinity."""
    case = cases.Case(M, 21, 96, blocksize=32, dtype=BF16)
    args = cases.make("linear_4bit", case)
    args[0][1, column] = value
    y = check("linear_4bit", args)
    assert not y[1].isfinite().any() and y[0].isfinite().all() and y[2:].isfinite().all()
    dy, *weight = cases.make(DX, case)
    dy = aligned_rows(dy)
    dy[1, column % 21] = value
    dx = check(DX, (dy, *weight))
    assert not dx[1].isfinite().any() and dx[0].isfinite().all() and dx[2:].isfinite().all()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("which", ["x", "A", "B"])
@pytest.mark.parametrize("adapter", [F32, BF16])
def test_infinities_of_the_adapter(value, which, adapter):
    """tf32 parts of an infinity: no infinity minus infinity."""
    args = cases.make(FORWARD, cases.Case(20, 21, 128, dtype=BF16, adapter=adapter, R=5))
    args[{"x": 0, "A": 10, "B": 11}[which]][1, -1] = value
    y, _ = check(FORWARD, args)
    assert which != "B" or (y[:, 0].isfinite().all() and not y[:, 1].isfinite().any())


@pytest.mark.parametrize("which", [10, 11])
def test_adapters_of_every_size(which):
    """As accurate as float32 although the products are of tf32 numbers."""
    case = cases.Case(20, 40, 128, dtype=F16, R=12, scaling=0.5)
    args = list(cases.make(FORWARD, case))
    args[which] = args[which] * 10.0 ** torch.randint(-6, 3, args[which].shape)
    check(FORWARD, tuple(args), tolerance.c_worst_case(case.K + case.R))


def test_the_adapter_is_float32():
    """Without a base, what remains is rounded once: far within tf32's precision of float16's."""
    case = cases.Case(33, 65, 64, dtype=F16, R=20)
    args = list(cases.make(FORWARD, case))
    args[2] = torch.zeros_like(args[2])  # absmax
    y, s = ops.lora_linear_4bit(*args)
    value = 2.0 * s.double() @ args[11].double().T
    magnitude = 2.0 * s.double().abs() @ args[11].double().abs().T
    tolerance.assert_close("y", y, value, magnitude)


# -- without a base --------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("shape", [(1, 1, 8), (63, 130, 40), (65, 128, 136), (130, 300, 33)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_dense_base(dtype, shape, dropout_p):
    """The dense library adds its product to what these kernels leave."""
    M, N, K = shape
    case = cases.Case(M, N, K, dtype=dtype, bias=F32, R=9, dropout_p=dropout_p)
    check("lora_linear", cases.make("lora_linear", case))
    check("lora_linear_backward", cases.make("lora_linear_backward", case))


def test_many_rows():
    case = cases.Case(1100, 40, 64, dtype=BF16, bias=BF16, dropout_p=0.25)
    check(FORWARD, cases.make(FORWARD, case))
    check(BACKWARD, cases.make(BACKWARD, case))


# -- bits ------------------------------------------------------------------------------------------
SYNC = [
    cases.Case(13, 40, 320, double_quant=True, dtype=BF16, dropout_p=0.25),
    cases.Case(40, 24, 1024, dtype=F16, R=1),
    cases.Case(70, 136, 320, dtype=BF16, adapter=BF16, dropout_p=0.5),
]


@pytest.mark.parametrize("case", SYNC)
def test_every_order_of_the_threads_gives_the_same_bits(case):
    forward, backward = cases.make(FORWARD, case), cases.make(BACKWARD, case)

    def run():
        return ops.lora_linear_4bit(*forward), ops.lora_linear_4bit_backward(*backward)[0]

    expected = run()
    for order, seed in ((1, 0), (2, 1), (2, 2)):
        with thread_order(order, seed):
            tolerance.assert_same_bits("outputs", run(), expected)


# Rows at which the tile's shape or the number of splits may change.
@pytest.mark.parametrize("rows", [(9, 16), (17, 40, 64), (65, 128), (129, 140)])
@pytest.mark.parametrize("K", [192, 1024])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_a_row_has_its_bits_among_any_others(rows, K, dropout_p):
    case = cases.Case(rows[-1], 64, K, dtype=BF16, dropout_p=dropout_p, bias=F32)
    x, *rest = cases.make(FORWARD, case)
    y, _ = ops.lora_linear_4bit(x, *rest)
    dy, x2, s, *more = cases.make(BACKWARD, case)
    dx = ops.lora_linear_4bit_backward(dy, x2, s, *more)[0]
    for M in rows[:-1]:
        # The first rows: dropout depends on where a row is.
        part, _ = ops.lora_linear_4bit(x[:M], *rest)
        tolerance.assert_same_bits("y", part, y[:M])
        part = ops.lora_linear_4bit_backward(dy[:M], x2[:M], s[:M], *more)[0]
        tolerance.assert_same_bits("dx", part, dx[:M])
    order = torch.randperm(case.M)
    tolerance.assert_same_bits(
        "dx", ops.linear_4bit_dx(dy[order], *more[:9]), ops.linear_4bit_dx(dy, *more[:9])[order]
    )


# -- the C interface: which problems are taken -----------------------------------------------------
class Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int)] + [
        (name, ctypes.c_int64) for name in ("rows", "cols", "stride")
    ]


class Vector(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int)]


class Dropout(ctypes.Structure):
    _fields_ = [
        ("threshold", ctypes.c_uint32),
        ("scale", ctypes.c_float),
        ("seed", ctypes.c_void_p),
    ]


class Lora(ctypes.Structure):
    _fields_ = [("A", Matrix), ("B", Matrix), ("scaling", ctypes.c_float), ("dropout", Dropout)]


class LinearArgs(ctypes.Structure):
    _fields_ = [
        ("x", Matrix),
        ("quantized", ctypes.POINTER(Weight4)),
        ("dense", ctypes.c_void_p),
        ("lora", Lora),
        ("bias", Vector),
        ("y", Matrix),
        ("s", ctypes.c_void_p),
        ("arithmetic", ctypes.c_int),
    ]


class LaunchPlan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("family", "rest")),
        *((name, ctypes.c_bool) for name in ("has_rest", "lora_on_tensor_cores")),
        ("workspace", ctypes.c_int64),
    ]


MMA = 2


def plan(M, N, K, shift=6, dtype=1, data=4096, stride=None, packed=4096):
    plan_linear = launcher("plan_linear", LaunchPlan, ctypes.c_void_p, ctypes.c_int)
    w = Weight4(packed=packed, N=N, K=K, block_shift=shift)
    x, y = Matrix(data, dtype, M, K, stride or K), Matrix(4096, dtype, M, N, N)
    args = LinearArgs(x=x, quantized=ctypes.pointer(w), y=y)
    return plan_linear(ctypes.byref(args), 0)


def test_what_is_taken():
    assert plan(100, 256, 128).family == MMA
    refused = (
        {"dtype": 0}, {"K": 96}, {"data": 4104}, {"stride": 132}, {"packed": 4100}, {"shift": 8},
    )  # fmt: skip
    for change in refused:
        assert plan(**{"M": 100, "N": 256, "K": 128} | change).family != MMA, change


def test_splits_fill_the_device():
    """On the emulator's 132 multiprocessors; what is needed for partial sums tells the splits.

    For numbers of rows that the dispatcher leaves to this family.
    """

    def splits(M, N, K):
        return plan(M, N, K).workspace / (4 * M * ((N + 3) // 4 * 4))

    assert splits(100, 14336, 192) == 0  # one
    for M, N in ((100, 4096), (200, 1024), (65, 1), (70, 301)):
        count = splits(M, N, 4096)
        assert count == int(count) and 2 <= count <= 16
    for low, high in ((65, 128), (129, 256), (257, 320)):
        assert splits(low, 4096, 4096) == splits(high, 4096, 4096)
