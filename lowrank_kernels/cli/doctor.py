"""``doctor``: what is installed, which kernels would run, a self-test of each of them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable

import torch

import lowrank_kernels as lk

from .. import cuda_library, reference
from ..benchmark import machine

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


# Largest relative error of a self-test. bfloat16 has 8 significant bits, to which every result and, on
# tensor cores, every weight is rounded.
_BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def run(args: argparse.Namespace) -> int:
    """Prints the report; 0 if all that is here works, 1 if something does not or there are no kernels."""
    found = examine(say=(lambda line="": None) if args.json else print)
    if args.json:
        print(json.dumps(found, indent=2))
    return 1 if found["problems"] else 0


def examine(say: Callable[..., None]) -> dict:
    """What was found, as --json prints it; ``say`` gets every line of the report as soon as it is known."""
    cuda = cuda_library.status()  # starts CUDA: who serves the GPUs is known from here on
    served = lk.backends.triton_serves_gpus()
    found = {
        "versions": machine.versions(),
        "cpu": machine.cpu(),
        "libraries": sorted(str(path) for path in _PACKAGE.iterdir() if path.suffix == ".so"),
        "backends": lk.backends.report(),
        "cuda": dataclasses.asdict(cuda) | {"served_by_triton": served},
    }
    _say_installation(found, say)
    _say_cuda(cuda, served, say)
    say()
    failures = self_tests(found["backends"], say)
    problems = [*cuda.problems, *(() if served else cuda.lacking)]
    for problem in problems:
        say(f"CUDA FAILED: {problem}")
    if served or found["backends"]["active"] in ("cpu", "cuda"):  # others stand above both
        failures |= gpu_self_tests(cuda, served, say)
    found["self_tests"] = failures
    found["problems"] = [*problems, *(f"{name}: {why}" for name, why in failures.items() if why)]
    say(f"\n{len(found['problems'])} problem(s)" if found["problems"] else "\nall good")
    return found


def _say_installation(found: dict, say: Callable[..., None]) -> None:
    cpu, report = found["cpu"], found["backends"]
    for name, version in found["versions"].items():
        say(f"{name:16} {version or 'not installed'}")
    cache = cpu["last_level_cache_bytes"] / 2**20
    say(f"{'CPU':16} {cpu['model']} ({cpu['identity']})")
    say(f"{'threads':16} {report['threads']} of {cpu['cores']} cores, cache {cache:.0f} MiB")
    say(f"{'backends':16} {', '.join(report['available'])}; active: {report['active']}")
    for path in found["libraries"] or [f"none in {_PACKAGE}"]:
        say(f"{'library':16} {path}")
    say(f"{'build':16} {report['build']}")
    say(f"{'ISA':16} {report['isa']}; supported: {', '.join(report['isas_supported']) or 'none'}")
    for product, kernels in (report["kernels"] or {}).items():
        rows = (f"{name} {first}-{last or ''}" for name, (first, last) in kernels.items())
        say(f"{f'{product}, by rows':16} {', '.join(rows)}")
    say(f"{'int8':16} {report['int8'] or 'none'}")


def _say_cuda(cuda: cuda_library.Status, served: bool, say: Callable[..., None]) -> None:
    """Library, torch, driver and each GPU; why there is none, where that is no mistake."""
    say(f"{'CUDA library':16} {cuda.built}")
    say(f"{'CUDA of torch':16} {cuda.torch}")
    say(f"{'CUDA of driver':16} {cuda.driver}")
    for device in cuda.devices:
        capability = "{}.{}".format(*device.capability)
        covered = "in the library" if device.covered else "NOT in the library"
        say(f"{f'cuda:{device.index}':16} {device.name}, capability {capability}: {covered}")
    if served:
        say(f"{'CUDA':16} Triton serves the GPUs")
        for line in cuda.lacking:
            say(f"{'CUDA':16} {line}")
    if cuda.note:
        say(f"{'CUDA':16} {cuda.note}")


def gpu_self_tests(
    cuda: cuda_library.Status, served: bool, say: Callable[..., None]
) -> dict[str, str | None]:
    """Runs :func:`check_layer` on each GPU that has kernels, a line for each dtype; name -> what is wrong."""
    results = {}
    for device in cuda.devices:
        for dtype in _BOUNDS if device.covered or served else ():
            name = f"cuda:{device.index} {str(dtype).removeprefix('torch.')}"
            results[name] = _problem(device=f"cuda:{device.index}", dtype=dtype)
            say(f"self-test {name:16} {results[name] or 'quantize, forward, backward: ok'}")
    return results


def self_tests(report: dict, say: Callable[..., None]) -> dict[str, str | None]:
    """Runs :func:`check_layer` on each instruction set, a line for each; name -> what is wrong, or None."""
    # "cuda" leaves the CPU's kernels where they are.
    forced = report["active"] not in ("cpu", "cuda")
    names = [report["active"]] if forced else report["isas_supported"]
    if not names:
        say(f"self-test failed: no kernels ({report['build']})")
        return {"no kernels": report["build"]}
    results = {}
    for name in names:
        with contextlib.nullcontext() if forced else lk.backends.use_isa(name):
            results[name] = _problem()
        say(f"self-test {name:16} {results[name] or 'quantize, forward, backward: ok'}")
    return results


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
