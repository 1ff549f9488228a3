"""OpenVINO's product with an NF4 weight, on a CPU: dequantized inside the kernel, as ours is.

It reads our codes and dequantizes to the same values, but has no double quantization: its scales
are float32, 0.375 bits a weight more than ours.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable

import torch

from lowrank_kernels import Weight4bit, reference

from . import check, providers
from .cases import BLOCKSIZE, Case
from .providers import Calls, Unavailable

NAME = "OpenVINO NF4 (float32 scales)"
TOLERANCE = {"float32": 1e-3, "bfloat16": check.TOLERANCE}  # of the norm


def version() -> str | None:
    try:
        return importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        return None


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

    Raises Unavailable where the weight would not stay in 4 bits; Wrong for a wrong result.
    """
    ov = openvino()
    if case.K % BLOCKSIZE:
        raise Unavailable(f"OpenVINO has blocks within rows only: K % {BLOCKSIZE} must be 0")
    kind = {"float32": ov.Type.f32, "bfloat16": ov.Type.bf16}[case.dtype]
    able = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if kind == ov.Type.bf16 and "BF16" not in able:
        raise Unavailable("OpenVINO computes in bfloat16 only on a CPU that does")
    config = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": kind,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    x, y = providers.x_of(case), torch.zeros(case.M, case.N, dtype=case.torch_dtype)
    calls = []
    for w in providers.weights_4bit(case):
        compiled = core().compile_model(_model(ov, w, case.M, kind), "CPU", config)
        if not calls:
            check_in_4_bits(compiled)
        calls.append(_call(ov, compiled.create_infer_request(), x, y, kind))
        check.verify(case, [calls[-1]()], TOLERANCE[case.dtype])
    return calls


def _model(ov, w: Weight4bit, M: int, kind):
    """x -> x Wᵀ. The arithmetic is written in float32; the precision hint may lower it."""
    op, (N, K) = ov.opset13, w.shape
    blocks = [N, K // BLOCKSIZE]
    packed = ov.Tensor(ov.Type.nf4, ov.Shape([*blocks, BLOCKSIZE]))  # owns its memory
    packed.data[:] = swap_nibbles(w.packed.flatten()).numpy()
    codes = ov.op.Constant(packed)
    scales = reference.block_scales(w.absmax, w.nested_absmax, w.nested_code, w.nested_offset)
    scaled = op.multiply(op.convert(codes, "f32"), op.constant(scales.view(*blocks, 1).numpy()))
    weight = op.reshape(scaled, op.constant([N, K]), False)
    x = op.parameter([M, K], kind)
    product = op.matmul(op.convert(x, "f32"), weight, False, True)
    return ov.Model([op.convert(product, kind.to_string())], [x])


def _call(ov, request, x: torch.Tensor, y: torch.Tensor, kind) -> Callable[[], torch.Tensor]:
    def view(t: torch.Tensor):
        return ov.Tensor(t.view(torch.uint8).numpy(), ov.Shape(list(t.shape)), kind)

    request.set_input_tensor(view(x))
    request.set_output_tensor(view(y))

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
