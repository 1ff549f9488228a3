"""Products with integer weights: ONNX Runtime's MatMulNBits, and torch's int4pack and int8pack.

Not the same weights as ours: :func:`int4` rounds the matrix of a shape to 16 equal steps with a scale for each block
of 64, :func:`int8` to 255 steps with a scale for each row. Every product is compared with these weights, in float64.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from lowrank_kernels.benchmark import providers
from lowrank_kernels.benchmark.case import BLOCKSIZE, Case
from lowrank_kernels.benchmark.harness import Provider
from lowrank_kernels.benchmark.providers import Calls, Unavailable

ORT, ORT_INT8 = "ONNX Runtime int4", "ONNX Runtime int4 (int8 activations)"
INT4PACK, INT8PACK = "torch int4pack", "torch int8pack"
# Bounds of the norm of the error: sums in float32; one rounding to bfloat16; activations in 8 bits.
EXACT, ROUNDED, EIGHT_BITS = 1e-5, 3e-3, 1.2e-2


class Int4(NamedTuple):
    """``scales * (codes - 8)``: codes [N, blocks, 64] in bytes, scales [N, blocks], which bfloat16 holds exactly."""

    codes: torch.Tensor
    scales: torch.Tensor

    def nibbles(self) -> torch.Tensor:
        """Two codes in a byte, the first one in the low half: [N, blocks, 32]."""
        return self.codes[..., ::2] | self.codes[..., 1::2] << 4


@functools.lru_cache(maxsize=1)
def int4(N: int, K: int) -> Int4:
    """The matrix of :func:`providers.dense_weight`. Raises Unavailable where rows are not whole blocks."""
    if K % BLOCKSIZE:
        raise Unavailable(f"blocks lie within rows: K % {BLOCKSIZE} must be 0")
    blocks = providers.dense_weight(N, K, "cpu").view(N, K // BLOCKSIZE, BLOCKSIZE)
    scales = (blocks.abs().amax(2) / 7).bfloat16().float()
    codes = (blocks / scales[..., None]).round().clamp(-8, 7) + 8
    return Int4(codes.to(torch.uint8), scales)


def int4_values(N: int, K: int) -> torch.Tensor:
    codes, scales = int4(N, K)
    return ((codes.double() - 8) * scales.double()[..., None]).view(N, K)


@functools.lru_cache(maxsize=1)
def int8(N: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes [N, K], scales [N], which bfloat16 holds exactly) of the same matrix."""
    dense = providers.dense_weight(N, K, "cpu")
    scales = (dense.abs().amax(1) / 127).bfloat16().float()
    return (dense / scales[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def int8_values(N: int, K: int) -> torch.Tensor:
    codes, scales = int8(N, K)
    return codes.double() * scales.double()[:, None]


# -- ONNX Runtime ----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def onnxruntime():
    """The package, with one pool of threads for all sessions; else those of the last one disturb the next.

    Raises Unavailable where it is missing.
    """
    try:
        import onnx  # noqa: F401, which the model is made with
        import onnxruntime
    except Exception as error:  # its import also fails on broken installations
        raise Unavailable(f"onnxruntime: {error}") from None
    onnxruntime.set_global_thread_pool_sizes(torch.get_num_threads(), 1)
    return onnxruntime


def _model(N: int, K: int, level: int) -> bytes:
    """x [M, K] -> x Wᵀ, W in 4 bits. ``level``: 0 multiplies in float32, 4 rounds activations to 8 bits."""
    from onnx import TensorProto, helper

    weight, form = int4(N, K), TensorProto.FLOAT
    tensors = [
        ("codes", TensorProto.UINT8, weight.nibbles()),
        ("scales", form, weight.scales.flatten()),
    ]
    constants = [
        helper.make_tensor(name, kind, t.shape, t.contiguous().numpy().tobytes(), raw=True)
        for name, kind, t in tensors
    ]
    options = {"K": K, "N": N, "bits": 4, "block_size": BLOCKSIZE, "accuracy_level": level}
    names = ["x", "codes", "scales"]
    node = helper.make_node("MatMulNBits", names, ["y"], domain="com.microsoft", **options)
    x, y = (helper.make_tensor_value_info(name, form, ["M", n]) for name, n in (("x", K), ("y", N)))
    graph = helper.make_graph([node], "linear", [x], [y], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@functools.lru_cache(maxsize=2)
def _sessions(N: int, K: int, level: int, count: int) -> list:
    """One for each copy of the weight, kept for the next M of the shape."""
    ort, model = onnxruntime(), _model(N, K, level)
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    make = functools.partial(ort.InferenceSession, providers=["CPUExecutionProvider"])
    return [make(model, options) for _ in range(count)]


def linear_ort(case: Case, level: int) -> Calls:
    """One session per copy, all with the same x and the same memory for y."""
    onnxruntime()
    if case.dtype != "float32":
        raise Unavailable("ONNX Runtime is compared with float32 activations only")
    x, y = providers.x_of(case), torch.zeros(case.M, case.N)

    def call(session, binding, x=x) -> torch.Tensor:  # holds x: the binding has its address
        session.run_with_iobinding(binding)
        return y

    calls, count = [], providers.copies(case, case.weight_bytes)
    for session in _sessions(case.N, case.K, level, count):
        binding = session.io_binding()
        for bind, name, tensor in ((binding.bind_input, "x", x), (binding.bind_output, "y", y)):
            array = tensor.numpy()
            bind(name, "cpu", 0, array.dtype.type, list(tensor.shape), tensor.data_ptr())
        calls.append(functools.partial(call, session, binding))
    return calls


# -- torch -----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _packed(N: int, K: int, bits: int, dtype: torch.dtype, count: int) -> list[tuple]:
    """The arguments after x, for each copy of the weight."""
    if bits == 8:
        codes, scales = int8(N, K)
        return [(codes.clone(), scales.to(dtype)) for _ in range(count)]
    weight = int4(N, K)
    codes = weight.codes.view(N, K).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    scales = weight.scales.T.to(dtype)
    pairs = torch.stack([scales, torch.zeros_like(scales)], 2).contiguous()  # with what is added
    return [(packed.clone(), BLOCKSIZE, pairs.clone()) for _ in range(count)]


def linear_torch_packed(case: Case, bits: int) -> Calls:
    product = getattr(
        torch.ops.aten, {4: "_weight_int4pack_mm_for_cpu", 8: "_weight_int8pack_mm"}[bits]
    )
    count = providers.copies(case, case.N * case.K * bits // 8)
    packed = _packed(case.N, case.K, bits, case.torch_dtype, count)
    return providers.call_each(case, lambda x, w: product(x, *w), providers.x_of(case), packed)


FLOAT32 = {
    ORT: Provider(functools.partial(linear_ort, level=0), tolerance=EXACT, weight=int4_values),
    ORT_INT8: Provider(
        functools.partial(linear_ort, level=4), tolerance=EIGHT_BITS, weight=int4_values
    ),
}
BFLOAT16 = {
    name: Provider(functools.partial(linear_torch_packed, bits=bits), tolerance=ROUNDED, weight=w)
    for name, bits, w in ((INT4PACK, 4, int4_values), (INT8PACK, 8, int8_values))
}
