"""Peers of the CPU benchmarks that need not be there: OpenVINO, and ggml as `make bench-peers` builds it."""

from __future__ import annotations

import builtins
import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # `bench` is no part of the package

from bench import peer_ggml, peer_openvino, suite
from lowrank_kernels.benchmark import check, providers
from lowrank_kernels.benchmark.case import Case


def present(library):
    """What ``library`` gives, or a skip with the reason why it is missing."""
    try:
        return library()
    except providers.Unavailable as reason:
        pytest.skip(str(reason))


def error(case: Case, y: torch.Tensor) -> float:
    (expected,) = check.expected(case)
    assert y.shape == expected.shape and y.dtype == case.torch_dtype
    return float((y.float() - expected).norm() / expected.norm())


# -- values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["cold", "hot"])
@pytest.mark.parametrize("M", [1, 5, 64])
def test_openvino(M, cache):
    """As exact as sums in float32 are, from every copy of the weight."""
    present(peer_openvino.openvino)
    case = Case("linear_4bit", 96, 128, M, "float32", cache)
    calls = peer_openvino.linear_openvino(case)
    assert len(calls) == len(providers.weights_4bit(case))
    for call in calls[:3]:
        assert error(case, call()) < 1e-5


@pytest.mark.parametrize("N, K", [(96, 128), (64, 96), (136, 4096)])
@pytest.mark.parametrize("M", [1, 4, 17])
def test_ggml(M, N, K):
    """Near, and not equal: a 4-bit code of its own, activations of 8 bits. All copies are alike."""
    present(peer_ggml.library)
    case = Case("linear_4bit", N, K, M)
    calls = peer_ggml.linear_ggml(case)
    first = calls[0]().clone()
    assert 1e-3 < error(case, first) < peer_ggml.TOLERANCE
    for call in calls[1:3]:
        assert torch.equal(call(), first)


@pytest.mark.parametrize("N, K", [(100, 128), (96, 130)])
def test_ggml_refuses_sizes(N, K):
    present(peer_ggml.library)
    with pytest.raises(providers.Unavailable, match="N % 8 and K % 32"):
        peer_ggml.linear_ggml(Case("linear_4bit", N, K, 1))


def test_openvino_refuses_blocks_across_rows():
    present(peer_openvino.openvino)
    with pytest.raises(providers.Unavailable, match="K % 64"):
        peer_openvino.linear_openvino(Case("linear_4bit", 64, 96, 1))


def test_openvino_refuses_a_dense_weight():
    """What OpenVINO multiplies dense, as it does where it dequantized a weight first, is not timed."""
    ov = present(peer_openvino.openvino)
    x = ov.opset13.parameter([5, 128], ov.Type.f32)
    dense = ov.opset13.constant(torch.randn(96, 128).numpy())
    model = ov.Model([ov.opset13.matmul(x, dense, False, True)], [x])
    with pytest.raises(providers.Unavailable, match="ahead of the product"):
        peer_openvino.check_in_4_bits(peer_openvino.core().compile_model(model, "CPU"))


# -- with neither library ----------------------------------------------------------------------------


def test_swap_nibbles():
    packed = torch.tensor([0x1F, 0xA0, 0x00, 0xFF, 0x48], dtype=torch.uint8)
    assert peer_openvino.swap_nibbles(packed).tolist() == [0xF1, 0x0A, 0x00, 0xFF, 0x84]


def test_without_openvino(monkeypatch):
    real = builtins.__import__

    def absent(name, *arguments, **options):
        if name == "openvino":
            raise ModuleNotFoundError("No module named 'openvino'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(providers.Unavailable, match="No module named 'openvino'"):
        peer_openvino.linear_openvino(Case("linear_4bit", 96, 128, 1))


def test_without_ggml(monkeypatch, tmp_path):
    monkeypatch.setattr(peer_ggml, "LIBRARY", tmp_path / "absent.so")
    peer_ggml.library.cache_clear()
    try:
        with pytest.raises(providers.Unavailable, match=r"make bench-peers"):
            peer_ggml.linear_ggml(Case("linear_4bit", 96, 128, 1))
        assert peer_ggml.version() is None
        (tmp_path / "absent.so").write_text("no library")
        with pytest.raises(providers.Unavailable, match=r"ggml: .*absent\.so"):
            peer_ggml.linear_ggml(Case("linear_4bit", 96, 128, 1))
    finally:
        peer_ggml.library.cache_clear()


@pytest.mark.parametrize("module, of_case", [
    (peer_ggml.library, peer_ggml.linear_ggml),
    (peer_openvino.openvino, peer_openvino.linear_openvino),
])  # fmt: skip
def test_float32_only(module, of_case):
    present(module)
    with pytest.raises(providers.Unavailable, match="float32 activations only"):
        of_case(Case("linear_4bit", 96, 128, 1, "bfloat16"))


def test_both_are_rows_of_the_table():
    peers = {peer_openvino.NAME, peer_ggml.NAME}
    for case, of_case in suite.linear(suite.SIZES["cpu"]):
        assert (peers <= set(of_case)) == (case.dtype == "float32")
        assert peers <= set(of_case) or not peers & set(of_case)
