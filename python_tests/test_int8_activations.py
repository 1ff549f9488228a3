"""``int8_activations``: what is rounded and how, what is refused, and that it ends where it should."""

import threading

import pytest
import torch

import banks
import cases
import conftest
import lowrank_kernels as lk
import tolerance
from lowrank_kernels import reference
from lowrank_kernels.schema import ops

pytestmark = [
    pytest.mark.skipif(
        conftest.ONLY_REFERENCE or conftest.ONLY_TRITON or conftest.ON_GPU,
        reason="int8 activations are the CPU kernels' alone",
    ),
]
KERNELS = {
    "amx": ("amx_int8", "avx512_vnni"),
    "avx512_bf16": ("avx512_vnni",),
    "avx512": ("avx512_vnni",),
    "avx2": ("avx_vnni",),
    "neon_bf16": ("neon_dotprod",),
    "neon": ("neon_dotprod",),
}
Case, F32, BF16, F16 = cases.Case, cases.F32, cases.BF16, cases.F16


@pytest.fixture(params=KERNELS)
def isa(request):
    """Each instruction set that int8 kernels can run beside."""
    if request.param not in lk.backends.isas():
        pytest.skip(f"this CPU has no kernels for {request.param}")
    with lk.backends.use_isa(request.param):
        if lk.backends.report()["int8"] is None:
            pytest.skip(f"this CPU has no {KERNELS[request.param][-1]}")
        yield request.param


@pytest.fixture
def some_isa():
    """The default instruction set, if it has int8 kernels."""
    if lk.backends.report()["int8"] is None:
        pytest.skip("this CPU has no int8 kernels")


# -- the oracle ------------------------------------------------------------------------------------


def byte_table(code: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(t, c) with t_i = round(code_i / c): of 127 down to 64 steps those of the least squared error."""
    largest = code.abs().max()
    scales = torch.arange(127, 63, -1) / largest
    rounded = (code * scales[:, None]).round().double()
    best = ((rounded / scales.double()[:, None] - code) ** 2).sum(1).argmin()
    return rounded[best], 1.0 / scales[best].item()


class Rounded:
    """x and a weight as int8 activations have them, in float64."""

    def __init__(self, x: torch.Tensor, *weight):
        packed, _, code, *nested, self.N, self.K, self.blocksize = weight
        self.size = min(64, self.blocksize)  # of a group
        groups = x.float().unflatten(1, (self.K // self.size, self.size))
        largest = groups.abs().amax(2, keepdim=True).clamp(min=2.0**-100)
        self.q = (
            (groups * (torch.tensor(127.0) / largest)).round().double()
        )  # in float32, as the kernel rounds
        self.x_scale = largest.double() / 127
        table, self.c = byte_table(code)
        data = packed.contiguous().view(torch.uint8).flatten()[: self.N * self.K // 2]
        nibbles = torch.stack((data >> 4, data & 15), 1).flatten().long()
        scales = reference.block_scales(weight[1], *nested).double()
        scales = scales.repeat_interleave(self.blocksize).view(self.N, self.K)
        self.w = self.c * table[nibbles].view(self.N, self.K) * scales
        self.exact = reference.dequantize_4bit(*weight).double()

    @property
    def x(self) -> torch.Tensor:
        return (self.q * self.x_scale).flatten(1)

    def product(self) -> tuple[torch.Tensor, torch.Tensor]:
        """x Wᵀ, and the sum of its groups' absolute values: what the float32 sum rounds relative to."""
        groups = self.w.unflatten(1, (-1, self.size))
        terms = torch.einsum("mgk,ngk->gmn", self.q * self.x_scale, groups)
        return terms.sum(0), terms.abs().sum(0)

    def bound(self, x: torch.Tensor) -> torch.Tensor:
        """Of the error against the exact product, as docs/int8.md states it."""
        half_steps = (self.x_scale / 2).expand_as(self.q).flatten(1)
        return (half_steps @ self.w.abs().T + x.double().abs() @ (self.w - self.exact).abs().T) * (
            1 + 1e-5
        )


def check(name: str, y: torch.Tensor, x: torch.Tensor, weight: tuple, rest=0.0, rest_size=0.0):
    """y against the rounded product plus ``rest``, within the bound of its float32 sums."""
    rounded = Rounded(x, *weight)
    value, magnitude = rounded.product()
    c = tolerance.c_worst_case(rounded.K // rounded.size)
    tolerance.assert_close(name, y, value + rest, magnitude + rest_size, c)
    return rounded


def adapter_part(args: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """What adapter and bias add in lora_linear_4bit(*args), and its magnitude."""
    no_weight = torch.zeros(args[7], args[8])
    values, magnitudes = tolerance.evaluate("lora_linear", (args[0], no_weight, *args[10:]))
    return values[0], magnitudes[0]


# -- numbers ---------------------------------------------------------------------------------------

# 576, 608: the last chunk of a row is not full; 1152: nor is the last panel. N: ragged vectors.
CASES = [
    Case(1, 33, 64), Case(1, 100, 576, double_quant=True), Case(2, 16, 1152, dtype=BF16),
    Case(3, 37, 96, blocksize=32, dtype=F16), Case(4, 130, 192, "fp4"), Case(4, 1, 512, blocksize=512),
    Case(5, 15, 608, blocksize=32, double_quant=True, bias=F32), Case(8, 65, 1152, bias=BF16),
    Case(14, 31, 128, "fp4", 128, dtype=BF16), Case(16, 160, 1088, double_quant=True, dtype=F16),
    Case(29, 257, 320, bias=F16), Case(70, 40, 4096, blocksize=4096), Case(6, 300, 2048, blocksize=1024),
    Case(515, 20, 192), Case(1, 4, 11008, double_quant=True),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_product_of_rounded_numbers(case, isa):
    args = cases.make("linear_4bit", case)
    with lk.int8_activations():
        y = ops.linear_4bit(*args)
    bias = 0.0 if args[10] is None else args[10].double()
    rounded = check("y", y, args[0], args[1:10], bias, abs(bias))
    # the stated bound against exact numbers; rounding to a 16-bit output comes on top
    exact = args[0].double() @ rounded.exact.T + bias
    error = (y.double() - exact).abs()
    slack = tolerance.U_OUT[y.dtype] * (exact.abs() + rounded.bound(args[0]))
    assert (error <= rounded.bound(args[0]) + slack).all()
    assert error.norm() > 1e-3 * exact.norm()  # it did round
    if case.quant_type == "nf4":
        assert error.norm() < 0.015 * (exact - bias).norm()


@pytest.mark.parametrize("op", ["linear_4bit", "lora_linear_4bit"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("isa", ["amx"], indirect=True)
def test_tile_registers_compute_the_same_bits(case, op, isa):
    """From few rows to many, in groups of 32 and 64, with the last register, panel and vector in part."""
    args = cases.make(op, case)
    outputs = []
    for kernel in ("amx", "gemm"):
        with lk.int8_activations(), lk.backends.use_kernel(kernel):
            outputs.append(cases.run(op, args)[0])
    tolerance.assert_same_bits("y", *outputs)
    with lk.int8_activations():
        tolerance.assert_same_bits("y", cases.run(op, args)[0], outputs[0])


ADAPTERS = [
    Case(1, 40, 128, R=4), Case(3, 33, 320, R=17, bias=F32, dtype=BF16, adapter=BF16),
    Case(7, 70, 192, R=16, scaling=-0.5), Case(33, 140, 1152, R=8, dtype=F16, bias=F16, dropout_p=0.25),
]  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapter_and_bias_are_exact(case, isa):
    args = cases.make("lora_linear_4bit", case)
    with lk.int8_activations():
        y, s = ops.lora_linear_4bit(*args)
    check("y", y, args[0], args[1:10], *adapter_part(args))
    tolerance.assert_same_bits("s", s, ops.lora_linear_4bit(*args)[1])


@pytest.mark.parametrize("case", ADAPTERS)
def test_many_adapters(case, isa):
    args = cases.make("multi_lora_linear_4bit", case._replace(adapter=F32))
    with lk.int8_activations():
        y, _ = ops.multi_lora_linear_4bit(*args)
    no_weight = [args[1], args[2] * 0, torch.zeros(16), *args[4:10]]
    values, magnitudes = tolerance.evaluate(
        "multi_lora_linear_4bit", (args[0], *no_weight, *args[10:])
    )
    check("y", y, args[0], args[1:10], values[0], magnitudes[0])


@pytest.mark.parametrize("case", [Case(3, 21, 128), Case(6, 21, 128)])
def test_infinities_and_nans_make_their_row_nan(case, isa):
    for value in (torch.inf, -torch.inf, torch.nan):
        args = cases.make("linear_4bit", case)
        args[0][1, 70] = value
        with lk.int8_activations():
            y = ops.linear_4bit(*args)
        assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("M", [2, 6])
def test_zeros_tiny_and_huge_activations(M, isa):
    args = cases.make("linear_4bit", Case(M, 21, 128))
    for factor in (0.0, 1e-20, 1e-37, 1e20):
        x = args[0] * factor
        with lk.int8_activations():
            y = ops.linear_4bit(x, *args[1:])
        check(f"times {factor}", y, x, args[1:10])
        assert y.any() == (factor > 1e-30)  # below 2^-100 / 254 all that is left of x is zero


@pytest.mark.parametrize("shape", [(0, 33, 64), (3, 0, 64), (3, 33, 0), (0, 0, 0), (7, 1, 0)])
def test_empty_dimensions(shape, isa):
    M, N, K = shape
    x, w, bias = torch.randn(M, K), lk.quantize_4bit(torch.randn(N, K)), torch.randn(N)
    with lk.int8_activations():
        y = lk.linear_4bit(x, w, bias)
    tolerance.assert_same_bits("y", y, bias.expand(M, N) if K == 0 else torch.empty(M, N))


@pytest.mark.parametrize("K", [192, 4096])
def test_bits_of_a_row_depend_on_nothing_else(K, isa, set_threads):
    """Not on the other rows, how many they are, nor on threads: one order of the sum for all."""
    args = cases.make("lora_linear_4bit", Case(600, 70, K, R=5))
    x, rest = args[0], args[1:]
    with lk.int8_activations():
        set_threads(1)
        whole = ops.lora_linear_4bit(*args)[0]
        for threads, sizes in ((2, (1, 2, 4, 5, 14, 15, 64)), (3, (600, 2))):
            set_threads(threads)
            for M in sizes:
                y = ops.lora_linear_4bit(x[600 - M :].clone(), *rest)[0]
                tolerance.assert_same_bits(f"M = {M}", y, whole[600 - M :])
        rows = x[::3]  # with gaps between its rows
        tolerance.assert_same_bits("strided", ops.lora_linear_4bit(rows, *rest)[0], whole[::3])


# -- layers and functions --------------------------------------------------------------------------


def test_layers(some_isa):
    layer = lk.LoRALinear4bit(128, 40, r=4).eval()
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    plain = lk.Linear4bit.from_weight(layer.weight4bit, layer.bias)
    x = torch.randn(2, 3, 128)
    A, B = layer.adapter_parameters("default")
    w, bias, scaling = layer.weight4bit, layer.bias.detach(), layer.scaling["default"]
    with torch.no_grad(), lk.int8_activations():
        y, base = layer(x), plain(x)
    args = (x.view(6, 128), *w.op_args(), A.detach(), B.detach(), scaling, bias, 0.0, None)
    check("LoRALinear4bit", y.view(6, 40), args[0], w.op_args(), *adapter_part(args))
    check("Linear4bit", base.view(6, 40), args[0], w.op_args(), bias.double(), bias.double().abs())


def test_a_model_with_many_adapters(some_isa):
    model = banks.make_model()
    bank, x = banks.make_bank(model), torch.randn(4, 64)
    names = ["a", None, "b", "c"]
    with torch.no_grad():
        plan = bank.plan(names)
        with bank.using(plan):
            exact = model.up(x)  # blocks of the other layer cross its rows
            with lk.int8_activations():
                y = model.up(x)
    assert 1e-4 < (y - exact).norm() / exact.norm() < 0.05


def test_autocast_and_dense_layers(some_isa):
    x, dense, w = torch.randn(3, 64), torch.randn(8, 64), lk.quantize_4bit(torch.randn(8, 64))
    A, B = torch.randn(2, 64), torch.randn(8, 2)
    expected = lk.lora_linear(x, dense, A, B)
    with lk.int8_activations():
        tolerance.assert_same_bits("dense", lk.lora_linear(x, dense, A, B), expected)
        with torch.autocast("cpu", torch.bfloat16):
            y = lk.linear_4bit(x, w)
    assert y.dtype == BF16
    check("autocast", y, x.bfloat16(), w.op_args())


# -- what is refused -------------------------------------------------------------------------------


def calls(x, w, bias=None):
    A, B = torch.randn(2, w.shape[1]), torch.randn(w.shape[0], 2)
    yield lambda: lk.linear_4bit(x, w, bias)
    yield lambda: lk.lora_linear_4bit(x, w, A, B, bias=bias)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("what", ["x", "bias"])
def test_gradients_are_refused(which, what, some_isa):
    x, bias = torch.randn(3, 64), torch.randn(8)
    call = list(calls(x, lk.quantize_4bit(torch.randn(8, 64)), bias))[which]
    {"x": x, "bias": bias}[what].requires_grad_()
    with lk.int8_activations():
        with pytest.raises(RuntimeError, match=r"inference only.*no_grad"):
            call()
        with torch.no_grad():
            rounded = call()
        with torch.inference_mode():
            assert torch.equal(call(), rounded)
    assert not torch.equal(call(), rounded)


def test_gradients_of_adapters_are_refused(some_isa):
    layer = lk.LoRALinear4bit(64, 8, bias=False, r=2)
    model = banks.make_model()
    bank = banks.make_bank(model)
    with lk.int8_activations():
        with pytest.raises(RuntimeError, match="inference only"):
            layer(torch.randn(1, 64))
        plan = bank.plan(["a"])
        with bank.using(plan), pytest.raises(RuntimeError, match="inference only"):
            model(torch.randn(1, 64))


def test_backward_of_an_exact_forward_is_exact(some_isa):
    x, w = torch.randn(3, 64, requires_grad=True), lk.quantize_4bit(torch.randn(8, 64))
    y = lk.linear_4bit(x, w)
    with lk.int8_activations():
        y.sum().backward()
    expected = ops.linear_4bit_dx(torch.ones(3, 8), *w.op_args())
    tolerance.assert_same_bits("dx", x.grad, expected)


@pytest.mark.parametrize("which", [0, 1])
def test_an_instruction_set_without_int8_is_refused(which):
    call = list(calls(torch.randn(3, 64), lk.quantize_4bit(torch.randn(8, 64))))[which]
    with lk.backends.use_isa("scalar"):
        assert lk.backends.report()["int8"] is None
        with lk.int8_activations(), pytest.raises(RuntimeError, match=r"VNNI.*scalar"):
            call()
        call()


@pytest.mark.parametrize("which", [0, 1])
def test_blocks_that_cross_rows_are_refused(which, some_isa):
    w = lk.quantize_4bit(torch.randn(8, 96))
    call = list(calls(torch.randn(3, 96), w))[which]
    message = r"w: expected in_features that are a multiple of the blocksize 64 .* got 96"
    with lk.int8_activations():
        with pytest.raises(ValueError, match=message):
            call()
        with pytest.raises(RuntimeError, match=message):
            ops.linear_4bit(torch.randn(3, 96), *w.op_args(), None)


def test_other_backends_and_devices_are_refused(some_isa):
    w = lk.quantize_4bit(torch.randn(8, 64))
    for call in calls(torch.randn(3, 64), w):
        with lk.backends.use("reference"), lk.int8_activations():
            with pytest.raises(RuntimeError, match="'cpu', got 'reference'"):
                call()

    class Elsewhere:
        is_meta, device = False, torch.device("cuda:1")

    with lk.int8_activations(), pytest.raises(RuntimeError, match="x on the CPU, got it on cuda:1"):
        lk.int8.check(Elsewhere(), lk.quantize_4bit(torch.randn(8, 64)), False)


# -- where it begins and ends ----------------------------------------------------------------------


def test_nests_and_restores(some_isa):
    x, w = torch.randn(3, 64), lk.quantize_4bit(torch.randn(8, 64))
    exact = lk.linear_4bit(x, w)

    def is_exact():
        return torch.equal(lk.linear_4bit(x, w), exact)

    with lk.int8_activations():
        with lk.int8_activations():
            assert not is_exact()
        assert not is_exact()
    assert is_exact()
    with pytest.raises(ZeroDivisionError), lk.int8_activations():
        _ = 1 / 0
    assert is_exact()

    @lk.int8_activations()
    def decorated():
        return is_exact()

    assert not decorated() and is_exact() and not decorated()


def test_other_threads_stay_exact(some_isa):
    x, w = torch.randn(3, 64), lk.quantize_4bit(torch.randn(8, 64))
    exact, seen = lk.linear_4bit(x, w), []
    with lk.int8_activations():
        thread = threading.Thread(target=lambda: seen.append(lk.linear_4bit(x, w)))
        thread.start()
        thread.join()
        assert torch.equal(seen[0], exact) and not torch.equal(lk.linear_4bit(x, w), exact)


def test_compiled_code_obeys_at_run_time(some_isa):
    w, x = lk.quantize_4bit(torch.randn(8, 64)), torch.randn(3, 64)
    compiled = torch.compile(lambda x: lk.linear_4bit(x, w) * 2, backend="aot_eager")
    exact = lk.linear_4bit(x, w)
    for _ in range(2):
        assert torch.equal(compiled(x), exact * 2)
        with lk.int8_activations():
            rounded = lk.linear_4bit(x, w)
            assert torch.equal(compiled(x), rounded * 2)
    assert not torch.equal(rounded, exact)
    with lk.int8_activations(), pytest.raises(RuntimeError, match="inference only"):
        compiled(x.clone().requires_grad_())


def test_report(isa):
    assert lk.backends.report()["int8"] in KERNELS[isa]
