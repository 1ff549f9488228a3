"""OpenVINO's product with an NF4 weight, on a CPU: dequantized inside the kernel, as ours is.

It reads our codes and dequantizes to the same values, but has no double quantization: its scales
are float32, 0.375 bits a weight more than ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from lowrank_kernels import Weight4bit, reference
from lowrank_kernels.benchmark import providers
from lowrank_kernels.benchmark.case import BLOCKSIZE, Case
from lowrank_kernels.benchmark.harness import Provider
from lowrank_kernels.benchmark.providers import Calls, Unavailable

NAME = "OpenVINO NF4 (float32 scales)"
TOLERANCE = 1e-3  # of the norm


def openvino():
    """The package. Raises Unavailable where it is missing."""
    try:
        import openvino
    except Exception as error:  # its import also fails on broken installations
        raise Unavailable(f"openvino: {error}") from None
    return openvino


@functools.lru_cache(maxsize=1)
def core():
    return openvino().Core()


def swap_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The bytes with their halves exchanged: OpenVINO keeps the first of two codes in the low one."""
    return (packed >> 4) | (packed << 4)


def linear_openvino(case: Case) -> Calls:
    """One compiled model per copy of the weight, all with the same x and the same memory for y.

    Raises Unavailable where the weight would not stay in 4 bits.
    """
    ov = openvino()
    if case.dtype != "float32":
        raise Unavailable("OpenVINO is compared with float32 activations only")
    if case.K % BLOCKSIZE:
        raise Unavailable(f"OpenVINO has blocks within rows only: K % {BLOCKSIZE} must be 0")
    config = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": ov.Type.f32,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    x, y = providers.x_of(case), torch.zeros(case.M, case.N)
    calls = []
    for w in providers.weights_4bit(case):
        compiled = core().compile_model(_model(ov, w, case.M), "CPU", config)
        if not calls:
            check_in_4_bits(compiled)
        calls.append(_call(ov, compiled.create_infer_request(), x, y))
    return calls


PROVIDER = Provider(linear_openvino, tolerance=TOLERANCE)


def _model(ov, w: Weight4bit, M: int):
    """x -> x Wᵀ, in float32."""
    op, (N, K) = ov.opset13, w.shape
    blocks = [N, K // BLOCKSIZE]
    packed = ov.Tensor(ov.Type.nf4, ov.Shape([*blocks, BLOCKSIZE]))  # owns its memory
    packed.data[:] = swap_nibbles(w.packed.flatten()).numpy()
    codes = ov.op.Constant(packed)
    scales = reference.block_scales(w.absmax, w.nested_absmax, w.nested_code, w.nested_offset)
    scaled = op.multiply(op.convert(codes, "f32"), op.constant(scales.view(*blocks, 1).numpy()))
    weight = op.reshape(scaled, op.constant([N, K]), False)
    x = op.parameter([M, K], ov.Type.f32)
    return ov.Model([op.matmul(x, weight, False, True)], [x])


def _call(ov, request, x: torch.Tensor, y: torch.Tensor) -> Callable[[], torch.Tensor]:
    request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))
    request.set_output_tensor(ov.Tensor(y.numpy(), shared_memory=True))

    def call(x=x) -> torch.Tensor:  # holds x: a view does not own its memory
        request.infer()
        return y

    return call


def check_in_4_bits(compiled) -> None:
    """Raises Unavailable unless the product itself reads NF4.

    Where its kernels do not take a weight, OpenVINO dequantizes it once and keeps the dense one.
    """
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        found = [info[key].astype(str) for key in ("layerType", "runtimePrecision") if key in info]
        if found == ["FullyConnected", "nf4"]:
            return
    raise Unavailable("OpenVINO dequantizes this weight ahead of the product")
