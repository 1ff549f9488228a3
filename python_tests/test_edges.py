"""The cases at the kernels' edges are those of the kernels that are built, and reach what they are meant to."""

import pytest

import conftest
import edges
import lowrank_kernels as lk

isas = pytest.mark.parametrize(
    "isa", ["scalar", "avx2", "avx512", "avx512_bf16", "amx", "neon", "neon_bf16"]
)


@pytest.mark.parametrize("isa", conftest.ISAS)
def test_the_constants_are_those_of_the_library(isa):
    """Read from the sources; of the built library its numbers of rows can be asked."""
    c = edges.constants(isa)
    with lk.backends.use_isa(isa):
        kernels = lk.backends.kernels()
    assert kernels["forward"]["gemv"] == kernels["dx"]["gemv"] == (1, c["kMaxGemv"])
    first = c["kAmxForward"] if isa == "amx" else c["kMaxSkinny"] + 1
    assert kernels["forward"]["skinny"][1] == min(c["kMaxSkinny"], first - 1)
    assert isa != "amx" or kernels["dx"]["amx"] == (c["kAmxDx"], None)


@isas
def test_the_lists_are_short_and_without_repetition(isa):
    for cases_of, least, most in (
        (edges.linear, 40, 75), (edges.many_adapters, 15, 30), (edges.weights, 10, 20),
    ):  # fmt: skip
        found = cases_of(isa)
        assert len(set(found)) == len(found) and least <= len(found) <= most


@isas
def test_every_size_has_a_case(isa):
    found = edges.linear(isa)
    for dimension, sizes in zip("MNK", edges._sizes(isa)):
        assert set(sizes) <= {getattr(case, dimension) for case in found}


@isas
def test_a_second_panel_a_second_strip_and_a_second_piece_of_both_directions(isa):
    """With whole blocks and more rows than gemv takes: a fault there once passed every test."""
    c = edges.constants(isa)
    width, piece = c["kStripWidth"], c["kStripsAtOnce"] * c["kStripWidth"]
    found = [
        case
        for case in edges.linear(isa)
        if c["kMaxGemv"] < case.M and case.K % case.blocksize == 0
    ]
    for depth, columns in (("N", "K"), ("K", "N")):
        deep = [case for case in found if getattr(case, depth) > c["kDepth"]]
        wide = [getattr(case, columns) for case in deep]
        assert any(width < size <= piece for size in wide) and any(size > piece for size in wide)
        assert any(c["kWhole"] < case.M for case in deep)
