"""In which numbers the CPU multiplies: float32, or bfloat16 where activations are, or torch permits it."""

import contextlib

import pytest
import torch

import cases
import conftest
import edges
import lowrank_kernels as lk
import tolerance
from lowrank_kernels import backends

pytestmark = pytest.mark.skipif(not conftest.ISAS, reason="about the native CPU kernels")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# A number of rows for each kernel, and a weight of several blocks, panels and strips.
ROWS = (1, 3, 4, 5, 16, 32, 33, 70)
SHAPE = (300, 1088)


@pytest.fixture(params=conftest.ISAS)
def isa(request):
    with backends.use_isa(request.param):
        yield request.param


@contextlib.contextmanager
def precision(name):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def arguments(rows, dtype, op="linear_4bit", **more):
    return cases.make(op, cases.Case(rows, *SHAPE, "nf4", 64, True, dtype=dtype, bias=None, **more))


def test_what_is_multiplied_in_what(isa):
    pairs = BF16 if edges.multiplies_pairs(isa) else F32
    assert [backends.products(t) for t in (F32, F16, BF16)] == [F32, F32, pairs]
    with precision("medium"):
        assert [backends.products(t) for t in (F32, F16, BF16)] == [pairs, F32, pairs]
        with backends.exact():
            assert {backends.products(t) for t in (F32, F16, BF16)} == {F32}
    with precision("high"):  # three bfloat16 numbers or TF32, neither of which these kernels have
        assert backends.products(F32) == F32


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("op", ["linear_4bit", "linear_4bit_dx"])
def test_bfloat16_activations(isa, op, rows):
    """Rounded operands, and within exact() none; each keeps the bound that ``backends.products`` stands for."""
    args = arguments(rows, BF16, op, **({"R": 8} if op.endswith("dx") else {}))
    rounded = cases.run(op, args)
    tolerance.check(op, args, rounded)
    with backends.exact():
        exact = cases.run(op, args)
        tolerance.check(op, args, exact)
    few = op.endswith("dx") and rows <= edges.constants(isa)["kMaxGemv"]
    assert torch.equal(rounded[0], exact[0]) == (not edges.multiplies_pairs(isa) or few)


@pytest.mark.parametrize("rows", ROWS)
def test_float32_activations_are_exact_unless_torch_permits_less(isa, rows):
    args = arguments(rows, F32)
    exact = cases.run("linear_4bit", args)
    with precision("medium"):
        medium = cases.run("linear_4bit", args)
        tolerance.check("linear_4bit", args, medium)
        with backends.exact():
            tolerance.assert_same_bits("exact", cases.run("linear_4bit", args), exact)
    assert torch.equal(medium[0], exact[0]) == (not edges.multiplies_pairs(isa))
    tolerance.check("linear_4bit", args, exact)


@pytest.mark.parametrize("rows", ROWS)
def test_float16_activations_are_exact(isa, rows):
    args = arguments(rows, F16)
    with precision("medium"):
        medium = cases.run("linear_4bit", args)
    with backends.exact():
        tolerance.assert_same_bits("float16", medium, cases.run("linear_4bit", args))


@pytest.mark.parametrize("rows", (2, 40))
def test_training_under_medium(isa, rows):
    """Forward and dx round, adapters do not: their gradients keep float32's bound."""
    forward = arguments(rows, F32, "lora_linear_4bit", R=8)
    backward = arguments(rows, F32, "lora_linear_4bit_backward", R=8)
    with precision("medium"):
        tolerance.check("lora_linear_4bit", forward, cases.run("lora_linear_4bit", forward))
        outputs = cases.run("lora_linear_4bit_backward", backward)
        tolerance.check("lora_linear_4bit_backward", backward, outputs)
    exact = cases.run("lora_linear_4bit_backward", backward)
    for name, one, other in zip(("dA", "dB", "dbias"), outputs[1:], exact[1:], strict=True):
        tolerance.assert_same_bits(name, one, other)


@pytest.mark.parametrize("rows", ROWS)
def test_the_error_of_rounded_operands(isa, rows):
    """Relative, by norms: a weight's scale is not rounded, so it is below that of a weight in bfloat16 (2.4e-3)."""
    torch.manual_seed(0)
    w = lk.quantize_4bit(torch.randn(SHAPE))
    x = torch.randn(rows, SHAPE[1], dtype=BF16)
    exact = x.double() @ w.dequantize(F32).double().T
    assert (lk.linear_4bit(x, w) - exact).norm() <= 2.4e-3 * exact.norm()
    with precision("medium"):
        assert (lk.linear_4bit(x.float(), w) - exact).norm() <= 2.4e-3 * exact.norm()


def test_a_rows_bits_do_not_depend_on_the_others(isa):
    """Within one kernel, as for float32."""
    x, *rest = arguments(70, BF16)
    with lk.batch_invariant():
        (whole,) = cases.run("linear_4bit", (x, *rest))
        for rows in (1, 5, 16, 33):
            (part,) = cases.run("linear_4bit", (x[:rows], *rest))
            tolerance.assert_same_bits(f"{rows} rows", part, whole[:rows])


def test_blocks_of_exact_overlap():
    first, second = backends.exact(), backends.exact()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert backends.products(BF16) == F32
    second.__exit__(None, None, None)
    assert (backends.products(BF16) == BF16) == edges.multiplies_pairs(backends.isa())
