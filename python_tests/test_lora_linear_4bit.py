"""y = x Wᵀ + scaling S Bᵀ + bias, S = dropout(x) Aᵀ, on a 4-bit weight. Dropout itself is tested here."""

import itertools
import math

import pytest
import torch

import cases
import edges
import lowrank_kernels as lk
import tolerance
from conftest import each_case
from lowrank_kernels import functional, reference
from lowrank_kernels.schema import ops

OP = "lora_linear_4bit"
# M = 3 runs on gemv, M = 6 on skinny or gemm; K = 130 has blocks that cross rows.
EXTREME = [cases.Case(M, 21, K, "nf4", 64, R=12) for M in (3, 6) for K in (128, 130)]


@each_case(cases.LARGE, cases.SHARED, edges.linear)
def test_forward(case, backend):
    y, s = tolerance.problem(OP, case).check()
    assert (y.dtype, s.dtype) == (case.dtype, torch.float32)


@pytest.mark.parametrize("shape", [(0, 33, 64), (3, 0, 64), (3, 33, 0), (0, 0, 0)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_empty_dimensions(shape, dropout_p, backend):
    M, N, K = shape
    bias = torch.randn(N)
    args = (lk.quantize_4bit(torch.randn(N, K)), torch.randn(4, K), torch.randn(N, 4), 2.0, bias)
    y = lk.lora_linear_4bit(torch.randn(M, K), *args, dropout_p)
    tolerance.assert_same_bits("y", y, bias.expand(M, N) if K == 0 else torch.empty(M, N))


@pytest.mark.parametrize("case", EXTREME)
def test_positive_terms(case, backend):
    x, packed, absmax, code, *rest = cases.make(OP, case)
    A, B, *rest = rest[6:]
    args = (x.abs(), packed, absmax, code.abs(), None, None, None, case.N, case.K, case.blocksize)
    args += (A.abs(), B.abs(), *rest)
    c = tolerance.c_worst_case(case.K + case.R)
    tolerance.check(OP, args, ops.lora_linear_4bit(*args), c)


@pytest.mark.parametrize("case", EXTREME)
@pytest.mark.parametrize("which", ["x", "A", "B"])
def test_values_of_every_size(case, which, backend):
    args = list(cases.make(OP, case))
    position = {"x": 0, "A": 10, "B": 11}[which]
    args[position] = args[position] * 10.0 ** torch.randint(-9, 9, args[position].shape)
    c = tolerance.c_worst_case(case.K + case.R)
    tolerance.check(OP, tuple(args), ops.lora_linear_4bit(*args), c)


@pytest.mark.parametrize("case", EXTREME)
@pytest.mark.parametrize("which", ["x", "A", "B"])
def test_infinities_and_nans_spread_as_in_ieee(case, which, backend, subtests):
    args = cases.make(OP, case)
    for value in (torch.inf, -torch.inf, torch.nan):
        with subtests.test(value=value):
            args[{"x": 0, "A": 10, "B": 11}[which]][1, -1] = value
            y, s = ops.lora_linear_4bit(*args)
            tolerance.check(OP, args, (y, s))
            spoiled = {"x": y[1], "A": s[:, 1], "B": y[:, 1]}[which]
            assert not spoiled.isfinite().any()
            assert which == "A" or y[0, 0].isfinite()


@pytest.mark.parametrize("case", EXTREME)
def test_scaling(case, backend, subtests):
    for scaling in (0.0, -1.0, 1e6, 1e-6):
        with subtests.test(scaling=scaling):
            args = cases.make(OP, case._replace(scaling=scaling))
            y, s = ops.lora_linear_4bit(*args)
            tolerance.check(OP, args, (y, s))
            if scaling == 0.0:
                assert torch.equal(y, ops.linear_4bit(*args[:10], args[13]))


# -- dropout ---------------------------------------------------------------------------------------
# Philox4x32-10: counter, key and result of Random123's test vectors (kat_vectors, DE Shaw Research).
PHILOX = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX)
def test_philox_known_answers(counter, key, expected):
    words = reference.philox_4x32([torch.tensor([c]) for c in counter], list(key))
    assert tuple(int(w) for w in words) == expected


def mask_of(M, K, p, seed, op="lora_linear_4bit"):
    """The kernel's mask: S of x = 1 and A = identity."""
    identity, B = torch.eye(K), torch.zeros(1, K)
    x, seed = torch.ones(M, K), torch.tensor([seed])
    if op == "lora_linear":
        return ops.lora_linear(x, torch.zeros(1, K), identity, B, 1.0, None, p, seed)[1]
    w = lk.quantize_4bit(torch.zeros(1, K)).op_args()
    return ops.lora_linear_4bit(x, *w, identity, B, 1.0, None, p, seed)[1]


@pytest.mark.parametrize("op", ["lora_linear_4bit", "lora_linear"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_mask_is_the_references(op, p, backend):
    """Exactly, for every element: kept ones are 1 / (1 - p) in float32."""
    seeds = (0, 1, -1, 2**32, 2**63 - 1, -(2**63), 0x0123456789ABCDEF)
    shapes = ((1, 1), (5, 3), (17, 70), (3, 128), (130, 33))
    for seed, shape in itertools.product(seeds, shapes):
        expected = reference.dropout_mask(*shape, p, torch.tensor([seed])).float()
        actual = mask_of(*shape, p, seed, op)
        tolerance.assert_same_bits(f"mask {shape} of the seed {seed}", actual, expected)


@pytest.mark.parametrize("p", [1e-12, 2.0**-32, 2.0**-31, 1 - 2.0**-20, 0.9999])
def test_the_mask_at_the_ends_of_p(p, backend):
    expected = reference.dropout_mask(40, 64, p, torch.tensor([7])).float()
    actual = mask_of(40, 64, p, 7)
    assert torch.equal(actual != 0, expected != 0)
    assert torch.allclose(actual, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.95])
def test_the_mask_is_random(p):
    """Counts over rows, columns, words and neighbours within five standard deviations of independence."""
    M, K = 512, 512
    kept = (reference.dropout_mask(M, K, p, torch.tensor([12345])) != 0).double()

    def check(sample, probability):
        n = sample.shape[-1]
        deviation = (sample.mean(-1) - probability).abs().max()
        assert deviation <= 5 * math.sqrt(probability * (1 - probability) / n)

    keep = 1 - p
    for view in (kept, kept.T, kept.reshape(-1, 4).T, kept.flatten()[None]):
        check(view, keep)
    check((kept[:, 1:] * kept[:, :-1]).flatten()[None], keep**2)
    check((kept[1:] * kept[:-1]).flatten()[None], keep**2)
    other = (reference.dropout_mask(M, K, p, torch.tensor([12346])) != 0).double()
    check((kept * other).flatten()[None], keep**2)


@pytest.mark.parametrize("op", ["lora_linear_4bit", "lora_linear"])
def test_manual_seed_reproduces_the_mask(op, backend):
    case = cases.Case(dropout_p=0.5)
    args = cases.make(op, case)
    torch.manual_seed(3)
    first, second = cases.call(op, args, case), cases.call(op, args, case)
    torch.manual_seed(3)
    seed = functional.dropout_seed(0.5, torch.device("cpu"))
    torch.manual_seed(3)
    again = cases.call(op, args, case)
    tolerance.assert_same_bits("y", again, first)
    assert not torch.equal(first, second)
    tolerance.check(op, (*args[:-1], seed), getattr(ops, op)(*args[:-1], seed))
    tolerance.assert_same_bits("y", first, getattr(ops, op)(*args[:-1], seed)[0])


@pytest.mark.parametrize("op", ["lora_linear_4bit", "lora_linear"])
def test_without_dropout_nothing_is_drawn(op, backend):
    case = cases.Case()
    args = cases.make(op, case)
    before = torch.get_rng_state()
    expected = cases.call(op, args, case)
    assert torch.equal(torch.get_rng_state(), before)
    tolerance.assert_same_bits("y", getattr(ops, op)(*args)[0], expected)


def test_the_mask_does_not_change_the_base(backend):
    """Dropout is of the adapter's input alone: with B = 0, y is that of the base."""
    case = cases.Case(7, dropout_p=0.5)
    args = list(cases.make(OP, case))
    args[11] = torch.zeros_like(args[11])
    y, _ = ops.lora_linear_4bit(*args)
    assert torch.equal(y, ops.linear_4bit(*args[:10], args[13]))
