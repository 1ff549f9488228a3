"""Every Triton kernel compiled ahead of time, with no GPU: for NVIDIA, and in its portable form for AMD.

The operators run on CPU tensors up to the launch of each kernel, which is compiled as it would be there (with the
tiles of small and of large batches) and not started. Registers and spills are what ptxas and LLVM report.
``LOWRANK_TEST_FULL=1`` takes all shapes for each operator, dtype and target; without it each gets one of them.
"""

import os
import pathlib
import re
import subprocess
import zlib

import pytest
import torch

import cases
import conftest
from lowrank_kernels import triton as triton_kernels
from lowrank_kernels.schema import OPS

if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)
triton = pytest.importorskip("triton", reason="triton is not installed")

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
MAX_SPILLED = 64  # bytes of a thread; the kernels of 16-bit weights in whole blocks spill nothing
SHARED_MEMORY = 99 * 1024  # what every target gives a block
# A tile for few and one for many rows on whole blocks; blocks that cross rows.
SHAPES = [(7, 512, 2048), (300, 512, 2048), (300, 33, 66)]


class Driver:
    """What a kernel's launch asks of a GPU until it is compiled. One device number per target, since kernels are
    cached by it."""

    def __init__(self, target: str):
        self.target = target

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget(*TARGETS[self.target])

    def get_current_device(self):
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(request, monkeypatch):
    """The kernels that were launched, by hash, for the target of the test."""
    kernels = {}
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernels[kernel.hash] = kernel, options
        return kernel

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    target = request.getfixturevalue("target")
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(target))
    return kernels


def usage(kernel, folder: pathlib.Path) -> dict[str, int]:
    """Registers of a thread, and the bytes of them that are kept in memory."""
    if "amdgcn" in kernel.asm:
        found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count): *(\d+)", kernel.asm["amdgcn"]))
        return {
            "registers": int(found["vgpr_count"]),
            "spilled": 4 * int(found["vgpr_spill_count"]),
        }
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, "-res-usage", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {"registers": int(registers), "spilled": int(stack)}


def compile_all(op: str, dtype: torch.dtype, shapes: list[tuple[int, int, int]] = SHAPES) -> None:
    for M, N, K in shapes:
        case = cases.Case(M, N, K, "nf4", 64, True, dtype, None, 16, cases.F32, dropout_p=0.1)
        triton_kernels.kernel_of(op)(*cases.make(op, case))


@pytest.mark.skipif(conftest.ON_GPU, reason="LOWRANK_TEST_DEVICE=cuda: the kernels run there")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [cases.F32, cases.BF16, cases.F16])
@pytest.mark.parametrize("op", OPS)
def test_compiles_without_spills(op, dtype, target, compiled, tmp_path, record_property):
    one = zlib.crc32(f"{op} {dtype} {target}".encode()) % len(SHAPES)
    compile_all(op, dtype, SHAPES if conftest.FULL else SHAPES[one : one + 1])
    check_usage(compiled, dtype, tmp_path, record_property)


@pytest.mark.skipif(conftest.ON_GPU, reason="LOWRANK_TEST_DEVICE=cuda: the kernels run there")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", [op for op in OPS if op.startswith("grouped")])
def test_tiles_of_stacked_experts_compile_without_spills(
    op, target, compiled, tmp_path, record_property
):
    """In float32, where registers are few: few and many rows, of a stack and of a transposed one."""
    compile_all(op, cases.F32, [(M, 33, 66) for M in (7, 8, 300, 301)])
    check_usage(compiled, cases.F32, tmp_path, record_property)


def check_usage(compiled, dtype, tmp_path, record_property):
    assert compiled
    for kernel, options in compiled.values():
        used = usage(kernel, tmp_path)
        name = f"{kernel.metadata.name} {options}"
        record_property(name, used)
        tensor_cores = options.get("BASE") == "runs" and dtype != cases.F32
        allowed = 0 if tensor_cores else MAX_SPILLED
        assert used["registers"] <= 512 and used["spilled"] <= allowed, (name, used)
        assert kernel.metadata.shared <= SHARED_MEMORY, (name, kernel.metadata.shared)


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_the_lookup_is_in_registers_on_nvidia_alone(target, compiled):
    compile_all("linear_4bit", cases.BF16, SHAPES[:1])
    kernels = [kernel for kernel, options in compiled.values() if options.get("BASE") == "runs"]
    assert kernels
    for kernel in kernels:
        assert ("prmt.b32 a," in kernel.asm.get("ptx", "")) == (target == "sm_80")


@pytest.mark.parametrize("target", ["sm_90"])
@pytest.mark.parametrize(
    "op", ["linear_4bit", "lora_linear_4bit_backward", "multi_lora_linear_4bit"]
)
def test_float32_is_never_rounded_to_tf32(op, target, compiled):
    compile_all(op, cases.F32, SHAPES[1:])
    for kernel, _ in compiled.values():
        assert "tf32" not in kernel.asm["ptx"], kernel.metadata.name


@pytest.mark.parametrize("target", ["sm_90"])
@pytest.mark.parametrize("op", ["dequantize_4bit", "quantize_4bit", "double_quantize"])
def test_what_is_exact_is_not_fused_or_approximated(op, target, compiled):
    """Scales are a product and a sum, each rounded; 1/absmax is a true quotient; nothing is flushed to zero."""
    compile_all(op, cases.BF16, SHAPES[:1])
    for kernel, _ in compiled.values():
        assert not re.search(r"fma\.rn\.f32|\.ftz|div\.(full|approx)", kernel.asm["ptx"])
