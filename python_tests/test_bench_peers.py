"""Peers of the CPU benchmarks that need not be there: OpenVINO, and ggml as `make bench-peers` builds it."""

from __future__ import annotations

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


@pytest.mark.parametrize("cache", ["cold", "hot"])
@pytest.mark.parametrize("M", [1, 5, 64])
def test_openvino(M, cache):
    """As exact as sums in float32 are, from every copy of the weight."""
    present(peer_openvino.openvino)
    case = Case("linear_4bit", 96, 128, M, "float32", cache)
    calls = peer_openvino.linear_openvino(case)
    assert len(calls) == len(providers.weights_4bit(case))
    for call in calls[:3]:
        check.verify(case, [call()], 1e-5)


@pytest.mark.parametrize("N, K", [(96, 128), (64, 96), (136, 4096)])
@pytest.mark.parametrize("M", [1, 4, 17])
def test_ggml(M, N, K):
    """Near, and not equal: a 4-bit code of its own, activations of 8 bits. All copies are alike."""
    present(peer_ggml.library)
    case = Case("linear_4bit", N, K, M)
    calls = peer_ggml.linear_ggml(case)
    first = calls[0]().clone()
    check.verify(case, [first], peer_ggml.TOLERANCE)
    with pytest.raises(check.Wrong):
        check.verify(case, [first], 1e-3)
    for call in calls[1:3]:
        assert torch.equal(call(), first)


@pytest.mark.parametrize("library, calls, N, K, dtype, words", [
    (peer_ggml.library, peer_ggml.linear_ggml, 100, 128, "float32", "N % 8 and K % 32"),
    (peer_ggml.library, peer_ggml.linear_ggml, 96, 130, "float32", "N % 8 and K % 32"),
    (peer_ggml.library, peer_ggml.linear_ggml, 96, 128, "bfloat16", "float32 activations only"),
    (peer_openvino.openvino, peer_openvino.linear_openvino, 64, 96, "float32", "K % 64"),
    (peer_openvino.openvino, peer_openvino.linear_openvino, 96, 128, "bfloat16", "float32 activations only"),
])  # fmt: skip
def test_what_they_do_not_take(library, calls, N, K, dtype, words):
    present(library)
    with pytest.raises(providers.Unavailable, match=words):
        calls(Case("linear_4bit", N, K, 1, dtype))


def test_openvino_refuses_a_dense_weight():
    """What OpenVINO multiplies dense, as it does where it dequantized a weight first, is not timed."""
    ov = present(peer_openvino.openvino)
    x = ov.opset13.parameter([5, 128], ov.Type.f32)
    dense = ov.opset13.constant(torch.randn(96, 128).numpy())
    model = ov.Model([ov.opset13.matmul(x, dense, False, True)], [x])
    with pytest.raises(providers.Unavailable, match="ahead of the product"):
        peer_openvino.check_in_4_bits(peer_openvino.core().compile_model(model, "CPU"))


def test_swap_nibbles():
    packed = torch.tensor([0x1F, 0xA0, 0x00, 0xFF, 0x48], dtype=torch.uint8)
    assert peer_openvino.swap_nibbles(packed).tolist() == [0xF1, 0x0A, 0x00, 0xFF, 0x84]


def test_with_neither_library(monkeypatch, tmp_path):
    case = Case("linear_4bit", 96, 128, 1)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(providers.Unavailable, match="openvino: "):
        peer_openvino.linear_openvino(case)
    monkeypatch.setattr(peer_ggml, "LIBRARY", tmp_path / "absent.so")
    peer_ggml.library.cache_clear()
    try:
        with pytest.raises(providers.Unavailable, match="make bench-peers"):
            peer_ggml.linear_ggml(case)
        assert peer_ggml.version() is None
        (tmp_path / "absent.so").write_text("no library")
        with pytest.raises(providers.Unavailable, match=r"ggml: .*absent\.so"):
            peer_ggml.linear_ggml(case)
    finally:
        peer_ggml.library.cache_clear()


def test_both_are_compared_in_float32():
    peers = {peer_openvino.NAME, peer_ggml.NAME}
    for case, of_case in suite.linear(suite.SIZES["cpu"]):
        assert peers & set(of_case) == (peers if case.dtype == "float32" else set())
