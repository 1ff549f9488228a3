"""What only a real GPU shows: streams, graphs, devices, and sizes at which everything is split.

The numbers of each operator are in test_<operator>.py, which LOWRANK_TEST_DEVICE=cuda runs on the GPU and
every other run on the emulator.
"""

from __future__ import annotations

import pytest
import torch

import cases
import conftest
import lowrank_kernels as lk
import tolerance
from lowrank_kernels.schema import ops

if not conftest.ON_GPU:
    pytest.skip("needs a GPU: LOWRANK_TEST_DEVICE=cuda (make gpu)", allow_module_level=True)

# Each family at the sizes of real models; K = 4100 has blocks that cross rows.
ROWS = (1, 4, 8, 9, 16, 17, 32, 33, 64, 65, 128, 256, 1000, 1025, 4096)
MODEL = cases.Case(1, 4096, 4096, "nf4", 64, True, cases.BF16, cases.F32, 16, scaling=2.0)
SHAPES = [
    MODEL, MODEL._replace(N=1024, dtype=cases.F16), MODEL._replace(N=14336, double_quant=False),
    MODEL._replace(N=1000, K=11008, blocksize=128), MODEL._replace(N=512, K=4100),
]  # fmt: skip


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", ["linear_4bit", "linear_4bit_dx", "lora_linear_4bit"])
def test_sizes_of_models(op, shape, rows, backend):
    args = cases.make(op, shape._replace(M=rows))
    tolerance.check(op, args, getattr(ops, op)(*args))


@pytest.mark.parametrize("rows", [1, 64, 300, 4096])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_backward_of_a_model(rows, dropout_p, backend):
    args = cases.make("lora_linear_4bit_backward", MODEL._replace(M=rows, dropout_p=dropout_p))
    outputs = ops.lora_linear_4bit_backward(*args)
    tolerance.check("lora_linear_4bit_backward", args, outputs)
    again = ops.lora_linear_4bit_backward(*args)
    tolerance.assert_same_bits("gradients", again, outputs)


@pytest.mark.parametrize("case", [MODEL, *cases.FEW])
def test_quantize_and_dequantize_give_the_bits_of_the_cpu(case, backend):
    weight = torch.randn(case.N, case.K, device="cpu").to(case.dtype)
    options = (case.quant_type, case.blocksize, case.double_quant)
    on_cpu, on_gpu = lk.quantize_4bit(weight, *options), lk.quantize_4bit(weight.cuda(), *options)
    for name, tensor in on_cpu.tensors().items():
        if name not in ("absmax", "nested_absmax", "nested_offset") or not case.double_quant:
            tolerance.assert_same_bits(name, on_gpu.tensors()[name].cpu(), tensor)
    moved = on_cpu.to("cuda")
    for dtype in (cases.F32, cases.BF16, cases.F16):
        dense = moved.dequantize(dtype).cpu()
        tolerance.assert_same_bits(f"{dtype}", dense, on_cpu.dequantize(dtype))


def _step(x, w, A, B, bias, dy, outputs):
    y = lk.lora_linear_4bit(x, w, A, B, 2.0, bias)
    for out, value in zip(outputs, (y, *torch.autograd.grad(y, (x, A, B, bias), dy)), strict=True):
        out.copy_(value)


@pytest.mark.parametrize("rows", [1, 16, 64, 300, 2000])
def test_forward_and_backward_in_a_cuda_graph(rows, backend):
    """Captured on one set of values, replayed on another: no hidden state, no synchronisation."""
    w = lk.quantize_4bit(torch.randn(512, 1024))
    x = torch.randn(rows, 1024, dtype=cases.BF16).requires_grad_()
    A, B = torch.randn(16, 1024).requires_grad_(), torch.randn(512, 16).requires_grad_()
    bias = torch.randn(512).requires_grad_()
    dy = torch.randn(rows, 512, dtype=cases.BF16)
    inputs = (x, w, A, B, bias, dy)
    outputs = [torch.empty_like(t) for t in (dy, x, A, B, bias)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _step(*inputs, outputs)  # warm-up, as torch asks for
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _step(*inputs, outputs)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        dy.copy_(torch.randn_like(dy))
    graph.replay()
    expected = [torch.empty_like(t) for t in outputs]
    _step(*inputs, expected)
    tolerance.assert_same_bits("replay", outputs, expected)


@pytest.mark.parametrize("rows", [1, 64, 300, 2000])
def test_runs_on_the_current_stream(rows, backend):
    """x is written by a slow kernel on that stream just before; another stream would read it too early."""
    w = lk.quantize_4bit(torch.randn(256, 4096))
    source = torch.randn(rows, 4096, dtype=cases.BF16)
    expected = lk.linear_4bit(source, w)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x = torch.zeros_like(source)
        torch.cuda._sleep(20_000_000)
        x.copy_(source)
        y = lk.linear_4bit(x, w)
    stream.synchronize()
    tolerance.assert_same_bits("y", y, expected)


def test_tensors_on_several_devices_are_refused(backend):
    w = lk.quantize_4bit(torch.randn(16, 64))
    x = torch.randn(2, 64)
    with pytest.raises(ValueError, match="bias: expected a tensor on cuda"):
        lk.linear_4bit(x, w, torch.zeros(16, device="cpu"))
    with pytest.raises(ValueError, match="weight: expected one on cuda"):
        lk.linear_4bit(x, w.to("cpu"))
    with pytest.raises(RuntimeError, match="code: expected a tensor on cuda:0, got one on the CPU"):
        ops.linear_4bit(x, *w.op_args()[:2], w.code.cpu(), *w.op_args()[3:], None)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(backend):
    w = lk.quantize_4bit(torch.randn(64, 128, device="cuda:1"))
    x = torch.randn(4, 128, device="cuda:1")
    assert torch.cuda.current_device() == 0
    y = lk.linear_4bit(x, w)
    assert y.device == x.device and torch.cuda.current_device() == 0
    assert torch.equal(y.cpu(), lk.linear_4bit(x.to("cuda:0"), w.to("cuda:0")).cpu())
