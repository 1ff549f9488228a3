"""OpenVINO's product with a 4-bit weight, on a CPU: dequantized inside the kernel, as ours is.

With NF4 it reads our codes and dequantizes to the same values, but has no double quantization: its scales
are float32, 0.375 bits a weight more than ours. With u4, whose steps are equal, it can round activations to 8 bits.
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

from . import peer_int4

NAME = "OpenVINO NF4 (float32 scales)"
TOLERANCE = 4e-3  # of the norm, where it multiplies in bfloat16; 2.9e-3 was measured


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


def linear_openvino(case: Case, kind: str = "nf4", precision: str = "f32", group: int = 0) -> Calls:
    """One compiled model per copy of the weight, all with the same x and the same memory for y.

    ``kind``: of the weight, "nf4" or "u4"; ``precision``: the hint in which it may multiply; ``group``: how many
    activations share a scale when they are rounded to 8 bits, 0 for none of that. Raises Unavailable where the weight
    would not stay in 4 bits.
    """
    ov = openvino()
    if case.dtype != "float32":
        raise Unavailable("OpenVINO is compared with float32 activations only")
    if case.K % BLOCKSIZE:
        raise Unavailable(f"OpenVINO has blocks within rows only: K % {BLOCKSIZE} must be 0")
    config = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": getattr(ov.Type, precision),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    x, y = providers.x_of(case), torch.zeros(case.M, case.N)
    calls = []
    for w in providers.weights_4bit(case):
        weight = _nf4(ov, w) if kind == "nf4" else _u4(ov, *w.shape)
        compiled = core().compile_model(_model(ov, weight, *w.shape, case.M), "CPU", config)
        if not calls:
            check_in_4_bits(compiled, kind)
        calls.append(_call(ov, compiled.create_infer_request(), x, y))
    return calls


BF16, U4 = "OpenVINO NF4, bfloat16 products", "OpenVINO u4 (int8 activations)"
PROVIDERS = {
    NAME: Provider(linear_openvino, tolerance=peer_int4.EXACT),
    BF16: Provider(functools.partial(linear_openvino, precision="bf16"), tolerance=TOLERANCE),
    U4: Provider(
        functools.partial(linear_openvino, kind="u4", group=BLOCKSIZE),
        tolerance=peer_int4.EIGHT_BITS,
        weight=peer_int4.int4_values,
    ),
}


def _packed(ov, kind: str, nibbles: torch.Tensor, *shape: int):
    """A constant of 4-bit numbers; it owns its memory."""
    packed = ov.Tensor(getattr(ov.Type, kind), ov.Shape(shape))
    packed.data[:] = nibbles.flatten().numpy()
    return ov.opset13.convert(ov.op.Constant(packed), "f32")


def _nf4(ov, w: Weight4bit):
    """The values of ``w``, [N, blocks, 64]."""
    op, (N, K) = ov.opset13, w.shape
    codes = _packed(ov, "nf4", swap_nibbles(w.packed), N, K // BLOCKSIZE, BLOCKSIZE)
    scales = reference.block_scales(w.absmax, w.nested_absmax, w.nested_code, w.nested_offset)
    return op.multiply(codes, op.constant(scales.view(N, K // BLOCKSIZE, 1).numpy()))


def _u4(ov, N: int, K: int):
    """The values of :func:`peer_int4.int4`. Only if 8, too, has 4 bits are activations rounded to 8 bits."""
    weight, op = peer_int4.int4(N, K), ov.opset13
    codes = _packed(ov, "u4", weight.nibbles(), N, K // BLOCKSIZE, BLOCKSIZE)
    eight = _packed(ov, "u4", torch.tensor([8], dtype=torch.uint8), 1)
    scales = op.constant(weight.scales[..., None].numpy())
    return op.multiply(op.subtract(codes, eight), scales)


def _model(ov, weight, N: int, K: int, M: int):
    """x -> x Wᵀ, in float32."""
    op = ov.opset13
    x = op.parameter([M, K], ov.Type.f32)
    dense = op.reshape(weight, op.constant([N, K]), False)
    return ov.Model([op.matmul(x, dense, False, True)], [x])


def _call(ov, request, x: torch.Tensor, y: torch.Tensor) -> Callable[[], torch.Tensor]:
    request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))
    request.set_output_tensor(ov.Tensor(y.numpy(), shared_memory=True))

    def call(x=x) -> torch.Tensor:  # holds x: a view does not own its memory
        request.infer()
        return y

    return call


def check_in_4_bits(compiled, kind: str = "nf4") -> None:
    """Raises Unavailable unless the product itself reads weights of ``kind``.

    Where its kernels do not take a weight, OpenVINO dequantizes it once and keeps the dense one.
    """
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        found = [info[key].astype(str) for key in ("layerType", "runtimePrecision") if key in info]
        if found == ["FullyConnected", kind]:
            return
    raise Unavailable("OpenVINO dequantizes this weight ahead of the product")
