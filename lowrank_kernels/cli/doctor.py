"""``doctor``: what is installed, which kernels would run, a self-test of each of them."""

from __future__ import annotations

import contextlib
import pathlib

import torch

import lowrank_kernels as lk

from .. import cuda_library, reference
from . import machine

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


# Largest relative error of a self-test. bfloat16 has 8 significant bits, to which every result and, on
# tensor cores, every weight is rounded.
_BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def run() -> int:
    """Prints the report; 0 if all that is here works, 1 if something does not or there are no kernels."""
    report = lk.backends.report()
    for name, version in machine.versions().items():
        print(f"{name:16} {version or 'not installed'}")
    cpu = machine.cpu()
    cache = cpu["last_level_cache_bytes"] / 2**20
    print(f"{'CPU':16} {cpu['model']} ({cpu['identity']})")
    print(f"{'threads':16} {report['threads']} of {cpu['cores']} cores, cache {cache:.0f} MiB")
    print(f"{'backends':16} {', '.join(report['available'])}; active: {report['active']}")
    libraries = sorted(path for path in _PACKAGE.iterdir() if path.suffix == ".so")
    for path in libraries:
        print(f"{'library':16} {path}")
    if not libraries:
        print(f"{'library':16} none in {_PACKAGE}")
    print(f"{'build':16} {report['build']}")
    print(f"{'ISA':16} {report['isa']}; supported: {', '.join(report['isas_supported']) or 'none'}")
    for product, kernels in (report["kernels"] or {}).items():
        rows = (f"{name} {first}-{last or ''}" for name, (first, last) in kernels.items())
        print(f"{f'{product}, by rows':16} {', '.join(rows)}")
    print(f"{'int8':16} {report['int8'] or 'none'}")
    cuda = cuda_library.status()
    print_cuda(cuda)
    print()
    failures = self_tests(report) + list(cuda.problems)
    for problem in cuda.problems:
        print(f"CUDA FAILED: {problem}")
    if report["active"] in ("cpu", "cuda"):  # others stand above the CUDA kernels
        failures += cuda_self_tests(cuda)
    print(f"\n{len(failures)} problem(s)" if failures else "\nall good")
    return 1 if failures else 0


def print_cuda(cuda: cuda_library.Status) -> None:
    """Library, torch, driver and each GPU; why there is none, where that is no mistake."""
    print(f"{'CUDA library':16} {cuda.built}")
    print(f"{'CUDA of torch':16} {cuda.torch}")
    print(f"{'CUDA of driver':16} {cuda.driver}")
    for device in cuda.devices:
        capability = "{}.{}".format(*device.capability)
        covered = "in the library" if device.covered else "NOT in the library"
        print(f"{f'cuda:{device.index}':16} {device.name}, capability {capability}: {covered}")
    if cuda.note:
        print(f"{'CUDA':16} {cuda.note}")


def cuda_self_tests(cuda: cuda_library.Status) -> list[str]:
    """Runs :func:`check_layer` on each GPU that the library covers, prints one line for each dtype."""
    failures = []
    for device in cuda.devices:
        for dtype in _BOUNDS if device.covered else ():
            problem = _problem(device=f"cuda:{device.index}", dtype=dtype)
            name = f"cuda:{device.index} {str(dtype).removeprefix('torch.')}"
            print(f"self-test {name:16} {problem or 'quantize, forward, backward: ok'}")
            failures += [problem] if problem else []
    return failures


def self_tests(report: dict) -> list[str]:
    """Runs :func:`check_layer` on each instruction set, prints one line for each; the failures."""
    # "cuda" leaves the CPU's kernels where they are.
    forced = report["active"] not in ("cpu", "cuda")
    names = [report["active"]] if forced else report["isas_supported"]
    if not names:
        print(f"self-test failed: no kernels ({report['build']})")
        return ["no kernels"]
    failures = []
    for name in names:
        with contextlib.nullcontext() if forced else lk.backends.use_isa(name):
            problem = _problem()
        print(f"self-test {name:16} {problem or 'quantize, forward, backward: ok'}")
        failures += [problem] if problem else []
    return failures


def _problem(**options) -> str | None:
    """What :func:`check_layer` found or raised; None if all is well."""
    try:
        check_layer(**options)
    except AssertionError as error:
        return f"FAILED: {error}"
    except Exception as error:  # a kernel that raises is a finding, not a crash of the doctor
        return f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def check_layer(
    M: int = 17,
    N: int = 96,
    K: int = 200,
    R: int = 8,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Quantize, LoRA forward and backward against the float64 reference on the CPU, elementwise.

    Ragged sizes: K is no multiple of the block, M none of a tile. ``dtype`` is that of weight, x and bias;
    the adapter is float32. AssertionError names the tensor.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    weight, x, dy, bias = random(N, K), random(M, K), random(M, N), random(N)
    A, B = random(R, K, dtype=torch.float32), random(N, R, dtype=torch.float32)
    w = lk.quantize_4bit(weight.to(device))
    inputs = [t.to(device).requires_grad_() for t in (x, A, B, bias)]
    y = lk.lora_linear_4bit(inputs[0], w, *inputs[1:3], scaling=2.0, bias=inputs[3])
    results = [y, *torch.autograd.grad(y, inputs, dy.to(device))]

    dense = w.dequantize(torch.float32).cpu()
    w = w.to("cpu")
    packed, _ = reference.quantize_4bit(weight, w.code, w.blocksize)
    if not torch.equal(packed.flatten(), w.packed.flatten().view(torch.uint8)):
        raise AssertionError("quantized bytes differ from the reference")
    if not torch.equal(dense, reference.dequantize_4bit(*w.op_args())):
        raise AssertionError("dequantized weight differs from the reference")
    expected_y, s = reference.lora_linear(x, dense, A, B, 2.0, bias, 0.0, None)
    expected = reference.lora_linear_backward(
        dy, x, s, dense, A, B, 2.0, bias, 0.0, None, True, True, True, True
    )
    bound = _BOUNDS[dtype]
    for name, got, want in zip(("y", "dx", "dA", "dB", "dbias"), results, (expected_y, *expected)):
        error = (got.detach().cpu().double() - want).abs().max() / want.abs().max()
        if not error < bound:
            raise AssertionError(f"{name}: relative error {error:.1e}, expected below {bound:.0e}")
