"""``doctor``: what is installed, which kernels would run, a self-test of each of them."""

from __future__ import annotations

import contextlib
import pathlib

import torch

import lowrank_kernels as lk

from .. import reference
from . import machine

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def run() -> int:
    """Prints the report; 0 if every self-test passed, 1 otherwise or if there are no kernels."""
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
    print(f"{'CUDA':16} {report.get('cuda') or 'built without CUDA'}")
    print(f"{'ISA':16} {report['isa']}; supported: {', '.join(report['isas_supported']) or 'none'}")
    print()
    failures = self_tests(report)
    print(f"\n{len(failures)} problem(s)" if failures else "\nall good")
    return 1 if failures else 0


def self_tests(report: dict) -> list[str]:
    """Runs :func:`check_layer` on each instruction set, prints one line for each; the failures."""
    forced = report["active"] != "cpu"
    names = [report["active"]] if forced else report["isas_supported"]
    if not names:
        print(f"self-test failed: no kernels ({report['build']})")
        return ["no kernels"]
    failures = []
    for name in names:
        with contextlib.nullcontext() if forced else lk.backends.use_isa(name):
            problem = _problem()
        print(f"self-test {name:12} {problem or 'quantize, forward, backward: ok'}")
        failures += [problem] if problem else []
    return failures


def _problem() -> str | None:
    """What :func:`check_layer` found or raised; None if all is well."""
    try:
        check_layer()
    except AssertionError as error:
        return f"FAILED: {error}"
    except Exception as error:  # a kernel that raises is a finding, not a crash of the doctor
        return f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def check_layer(M: int = 17, N: int = 96, K: int = 200, R: int = 8) -> None:
    """Quantize, LoRA forward and backward against the float64 reference, elementwise.

    Ragged sizes: K is no multiple of the block, M none of a tile. AssertionError names the tensor.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight, x, dy = random(N, K), random(M, K), random(M, N)
    A, B, bias = random(R, K), random(N, R), random(N)
    w = lk.quantize_4bit(weight)
    inputs = [t.requires_grad_() for t in (x, A, B, bias)]
    y = lk.lora_linear_4bit(x, w, A, B, scaling=2.0, bias=bias)
    results = [y, *torch.autograd.grad(y, inputs, dy)]

    packed, _ = reference.quantize_4bit(weight, w.code, w.blocksize)
    if not torch.equal(packed.flatten(), w.packed.flatten().view(torch.uint8)):
        raise AssertionError("quantized bytes differ from the reference")
    dense = reference.dequantize_4bit(*w.op_args())
    if not torch.equal(w.dequantize(torch.float32), dense):
        raise AssertionError("dequantized weight differs from the reference")
    forward = (x, dense, A, B, 2.0, bias, 0.0, None)
    with torch.no_grad():
        expected_y, s = reference.lora_linear(*forward)
        expected = reference.lora_linear_backward(
            dy, x, s, dense, A, B, 2.0, bias, 0.0, None, True, True, True, True
        )
    for name, got, want in zip(("y", "dx", "dA", "dB", "dbias"), results, (expected_y, *expected)):
        error = (got.detach().double() - want).abs().max() / want.abs().max()
        if not error < 1e-5:
            raise AssertionError(f"{name}: relative error {error:.1e}, expected below 1e-5")
