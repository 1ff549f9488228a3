"""The choice among the CPU kernels of the frozen base: shown, forced, and the one with equal bits in every batch."""

import pytest
import torch

import cases
import conftest
import lowrank_kernels as lk
import tolerance
from lowrank_kernels import backends

pytestmark = pytest.mark.skipif(
    conftest.KERNELS[0] != "cpu-scalar", reason="this is about the CPU kernels"
)
run = cases.run
MATRIX_OPS = (
    "linear_4bit",
    "linear_4bit_dx",
    "lora_linear_4bit",
    "lora_linear",
    "lora_linear_4bit_backward",
)
CASES = [
    cases.Case(70, 71, 320, "nf4", 64, True, cases.F32, cases.F32, 5),
    cases.Case(40, 33, 96, "fp4", 32, bias=cases.BF16, dtype=cases.BF16, R=12),
    cases.Case(40, 48, 65, "nf4", 64, True),  # blocks cross rows
]


@pytest.fixture(params=conftest.ISAS)
def isa(request):
    with backends.use_isa(request.param):
        yield request.param


def first_rows(args, case: cases.Case, height: int) -> list:
    return cases.with_rows(args, case, lambda a: a[:height])


def test_the_ranges_cover_every_number_of_rows(isa):
    for product, ranges in backends.report()["kernels"].items():
        assert set(ranges) <= set(backends.KERNELS), product
        last = 0
        for first, end in ranges.values():
            assert last is not None and first == last + 1 and (end is None or end >= first)
            last = end
        assert last is None
        assert ("amx" in ranges) == (isa == "amx")


@pytest.mark.parametrize("op", MATRIX_OPS)
@pytest.mark.parametrize("kernel", [*backends.KERNELS, "invariant"])
def test_each_kernel_keeps_the_bound(op, kernel, isa, subtests):
    if kernel == "amx" and isa != "amx":
        return
    for case in CASES:
        args = cases.make(op, case)
        with lk.batch_invariant() if kernel == "invariant" else backends.use_kernel(kernel):
            assert backends.report()["kernel"] == kernel
            for height in (1, 3, 5, 16, case.M):
                with subtests.test(case=str(case), height=height):
                    part = first_rows(args, case, height)
                    tolerance.check(op, part, run(op, part))
        assert backends.report()["kernel"] is None


def test_a_forced_kernel_is_other_code(isa):
    args = cases.make("linear_4bit", cases.Case(4, 300, 1024))
    chosen = run("linear_4bit", args)[0]
    with backends.use_kernel("gemv"):
        assert torch.equal(run("linear_4bit", args)[0], chosen)
    with backends.use_kernel("gemm"):
        gemm = run("linear_4bit", args)[0]
    with backends.use_kernel("skinny"):
        assert torch.equal(run("linear_4bit", args)[0], gemm)
    assert not torch.equal(gemm, chosen)
    if isa == "amx":
        with backends.use_kernel("amx"):
            assert not torch.equal(run("linear_4bit", args)[0], gemm)


@pytest.mark.parametrize("op", ["linear_4bit", "linear_4bit_dx"])
def test_tile_registers_multiply_bfloat16_once(op, isa):
    """Operands rounded once on every kernel: other bits than exact ones, and than those of other sums."""
    if isa != "amx":
        return
    args = cases.make(op, cases.Case(20, 96, 320))
    before = torch.get_float32_matmul_precision()
    results = {}
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        try:
            for kernel in ("gemm", "amx"):
                with backends.use_kernel(kernel):
                    results[precision, kernel] = run(op, args)[0].double()
        finally:
            torch.set_float32_matmul_precision(before)
    exact = results["highest", "gemm"]
    errors = {key: ((y - exact).norm() / exact.norm()).item() for key, y in results.items()}
    assert 0 < errors["highest", "amx"] < 1e-6
    assert 1e-3 < errors["medium", "amx"] < 4e-3 and 1e-3 < errors["medium", "gemm"] < 4e-3
    difference = (results["medium", "amx"] - results["medium", "gemm"]).norm() / exact.norm()
    assert 0 < difference < 1e-6, "the same numbers are multiplied"


def test_unknown_and_missing_kernels_are_refused():
    with pytest.raises(ValueError, match=r"name: expected one of .*got 'fast'"):
        with backends.use_kernel("fast"):
            pass
    with (
        backends.use_isa("scalar"),
        pytest.raises(ValueError, match="'scalar', has no kernel 'amx'"),
    ):
        with backends.use_kernel("amx"):
            pass


@pytest.mark.parametrize(
    ("old", "new"), [("few", "gemv"), ("small", "skinny"), ("panels", "gemm"), ("tiles", "amx")]
)
def test_the_names_of_earlier_versions_warn(old, new):
    if new == "amx" and backends.isa() != "amx":
        pytest.skip(f"{backends.isa()} has no kernel 'amx'")
    message = f"name: the kernel '{old}' is called '{new}' now"
    with pytest.warns(DeprecationWarning, match=message) as warnings, backends.use_kernel(old):
        assert backends.report()["kernel"] == new
    assert warnings[0].filename == __file__, "the warning points at the caller"


def test_the_names_of_kernels_are_the_librarys():
    names = backends.host_module().kernel_names()
    assert list(backends.KERNELS) == names == ["gemv", "skinny", "gemm", "amx"]
    with pytest.raises(ValueError, match="unknown kernel few"):
        backends.host_module().kernel_set("few")


@pytest.mark.parametrize("op", MATRIX_OPS)
@pytest.mark.parametrize("case", CASES)
def test_batch_invariance(op, case, isa):
    """The first row's y, S and dx are the same alone and among any others."""
    args = cases.make(op, case)
    per_row = 1 if op.endswith("backward") else 2  # dA, dB and dbias are sums over the rows
    with lk.batch_invariant():
        expected = run(op, args)[:per_row]
        for height in (1, 2, 4, 5, 9, 16, 17, 33, case.M - 1):
            for out, all_rows in zip(run(op, first_rows(args, case, height)), expected):
                tolerance.assert_same_bits(f"{op}, {height} rows", out, all_rows[:height])


def test_batch_invariance_of_a_module(isa):
    torch.manual_seed(0)
    layer = lk.LoRALinear4bit.from_linear(torch.nn.Linear(128, 96), r=4)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(60, 128)

    @lk.batch_invariant()
    def forward(rows):
        return layer(rows)

    together = forward(x)
    assert torch.equal(torch.cat([forward(row[None]) for row in x]), together)


def test_batch_invariance_is_of_the_cpu():
    w = lk.quantize_4bit(torch.randn(32, 64))
    with lk.batch_invariant(), backends.use("reference"):
        with pytest.raises(RuntimeError, match="batch_invariant: expected the backend 'cpu'"):
            lk.linear_4bit(torch.randn(2, 64), w)
    lk.linear_4bit(torch.randn(2, 64), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["linear_4bit", "linear_4bit_dx", "lora_linear"])
@pytest.mark.parametrize("kernel", backends.KERNELS)
def test_extreme_numbers_concern_their_row_alone(op, kernel, dtype, isa, subtests):
    """Tile registers know neither infinities of ours, nor subnormal numbers, nor the largest ones."""
    if kernel == "amx" and isa != "amx":
        return
    case = cases.Case(40, 33, 320, "nf4", 64, dtype=dtype, bias=None, R=4)
    x, *rest = cases.make(op, case)
    for number in (torch.inf, -torch.inf, torch.nan, 1e20, 1e38, 1e-41):
        with subtests.test(number=number), backends.use_kernel(kernel):
            extreme = x.clone()
            extreme[5] = 0.0
            extreme[5, 17] = number
            extreme[23, 300 % x.shape[1]] = number
            before, after = run(op, (x, *rest)), run(op, (extreme, *rest))
            others = [i for i in range(case.M) if i not in (5, 23)]
            tolerance.assert_same_bits(op, after[0][others], before[0][others])
            c = tolerance.c_worst_case(case.K)
            tolerance.check(op, (extreme, *rest), after, c=c)


def test_a_nan_of_any_bits_stays_one(isa):
    """Rounding 0x7fffffff to bfloat16 by adding to its bits would make it -0."""
    x, *rest = cases.make("linear_4bit", cases.Case(40, 33, 320, "nf4", 64))
    x.view(torch.int32)[7, 9] = 0x7FFFFFFF
    assert run("linear_4bit", (x, *rest))[0][7].isnan().all()
    rest[1].view(torch.int32)[0] = 0x7FFFFFFF  # the scale of the first block
    assert run("linear_4bit", (x, *rest))[0][:, 0].isnan().all()
    assert run("linear_4bit_dx", (torch.ones(40, 33), *rest[:-1]))[0][:, :64].isnan().all()
