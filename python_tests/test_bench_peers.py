"""Peers of the CPU benchmarks that need not be there: OpenVINO, ONNX Runtime, and ggml of `make bench-peers`."""

from __future__ import annotations

import dataclasses
import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # `bench` is no part of the package

from bench import peer_ggml, peer_int4, peer_openvino, suite
from lowrank_kernels.benchmark import check, harness, providers
from lowrank_kernels.benchmark.case import Case


def present(library):
    """What ``library`` gives, or a skip with the reason why it is missing."""
    try:
        return library()
    except providers.Unavailable as reason:
        pytest.skip(str(reason))


PEERS = {
    **dict.fromkeys(peer_openvino.PROVIDERS, peer_openvino.openvino),
    **dict.fromkeys(peer_int4.FLOAT32, peer_int4.onnxruntime),
    **dict.fromkeys(peer_int4.BFLOAT16, lambda: None),
}
INT8 = (peer_openvino.U4, peer_int4.ORT_INT8)


def case_and_peer(name: str, M: int, cache: str = "cold") -> tuple[Case, harness.Provider]:
    present(PEERS[name])
    dtype = "bfloat16" if name in peer_int4.BFLOAT16 else "float32"
    return Case("linear_4bit", 96, 128, M, dtype, cache), suite.LINEAR_PEERS[dtype][name]


@pytest.mark.parametrize("cache", ["cold", "hot"])
@pytest.mark.parametrize("M", [1, 5, 64])
@pytest.mark.parametrize("name", PEERS)
def test_products(name, M, cache, monkeypatch):
    """As near to float64 of their own weights as is stated, from every copy; what claims int8 does round to it."""
    monkeypatch.setattr(providers, "MAX_COPIES", 3)
    case, peer = case_and_peer(name, M, cache)
    calls = peer.calls(case)
    assert len(calls) == (3 if cache == "cold" else 1)
    for call in calls:
        error = check.verify(case, [call()], peer.tolerance, peer.weight)
        assert error > 2e-3 or name not in INT8
        if peer.weight:  # another weight than ours
            with pytest.raises(check.Wrong):
                check.verify(case, [call()], peer.tolerance)


@pytest.mark.parametrize("name", PEERS)
def test_a_wrong_product_is_not_timed(name, monkeypatch):
    monkeypatch.setattr(providers, "MAX_COPIES", 2)
    case, peer = case_and_peer(name, 5)

    def calls(case):
        return [lambda call=call: 1.05 * call() for call in peer.calls(case)]

    wrong = dataclasses.replace(peer, calls=calls)
    found = harness.measure(case, {"right": peer, "wrong": wrong}, 1e-6)
    assert found["right"]["relative_error"] < peer.tolerance
    assert "wrong result" in found["wrong"]["error"]


@pytest.mark.parametrize("N, K", [(96, 128), (64, 96), (136, 4096)])
@pytest.mark.parametrize("M", [1, 4, 17])
def test_ggml(M, N, K):
    """Near, and not equal: a 4-bit code of its own, activations of 8 bits. All copies are alike."""
    present(peer_ggml.library)
    case = Case("linear_4bit", N, K, M)
    calls = peer_ggml.linear_ggml(case)
    first = calls[0]().clone()
    check.verify(case, [first], peer_ggml.TOLERANCE, peer_ggml.values)
    for tolerance, weight in ((1e-3, peer_ggml.values), (peer_ggml.TOLERANCE, None)):
        with pytest.raises(check.Wrong):
            check.verify(case, [first], tolerance, weight)
    for call in calls[1:3]:
        assert torch.equal(call(), first)


@pytest.mark.parametrize("library, calls, N, K, dtype, words", [
    (peer_ggml.library, peer_ggml.linear_ggml, 100, 128, "float32", "N % 8 and K % 32"),
    (peer_ggml.library, peer_ggml.linear_ggml, 96, 130, "float32", "N % 8 and K % 32"),
    (peer_ggml.library, peer_ggml.linear_ggml, 96, 128, "bfloat16", "float32 activations only"),
    (peer_openvino.openvino, peer_openvino.linear_openvino, 64, 96, "float32", "K % 64"),
    (peer_openvino.openvino, peer_openvino.linear_openvino, 96, 128, "bfloat16", "float32 activations only"),
    (peer_int4.onnxruntime, peer_int4.FLOAT32[peer_int4.ORT].calls, 64, 96, "float32", "K % 64"),
    (peer_int4.onnxruntime, peer_int4.FLOAT32[peer_int4.ORT].calls, 96, 128, "bfloat16", "float32 activations only"),
    (lambda: None, peer_int4.BFLOAT16[peer_int4.INT4PACK].calls, 64, 96, "bfloat16", "K % 64"),
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


def test_without_the_libraries(monkeypatch, tmp_path):
    case = Case("linear_4bit", 96, 128, 1)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(peer_int4, "onnxruntime", peer_int4.onnxruntime.__wrapped__)
    found = harness.measure(case, peer_int4.FLOAT32, 1e-6)
    assert all(found[name]["unavailable"].startswith("onnx") for name in peer_int4.FLOAT32)
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


def test_every_peer_is_compared():
    for case, of_case in suite.linear(suite.SIZES["cpu"]):
        assert suite.LINEAR_PEERS[case.dtype].keys() | {"bitsandbytes", "torch"} < of_case.keys()
    floats, halves = (suite.LINEAR_PEERS[dtype].keys() for dtype in ("float32", "bfloat16"))
    assert PEERS.keys() | {peer_ggml.NAME, suite.INT8} == floats | halves
