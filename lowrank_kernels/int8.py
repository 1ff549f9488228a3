"""``int8_activations``: 4-bit linear layers on 8-bit integers, for inference on a CPU, where somebody asks for it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from . import backends
from .formats import Weight4bit

# Of this thread, as the native library's. torch.compile guards on it: compiled code is checked as well.
state = threading.local()


def active() -> bool:
    """Whether this thread is within :func:`int8_activations`."""
    return getattr(state, "active", False)


@contextlib.contextmanager
def int8_activations() -> Iterator[None]:
    """Within the block, or the function it decorates, 4-bit linear layers on the CPU round x to int8.

    Holds for :func:`linear_4bit`, :func:`lora_linear_4bit`, :class:`Linear4bit`, :class:`LoRALinear4bit`, with
    many adapters too. Of a row x, in groups g of 64 columns (32 where the weight's blocksize is 32)::

        s_g = max |x_k| / 127,   q_k = round(x_k / s_g)                        k in g
        t_i = round(code_i / c)                                                |t_i| <= 127, c one number
        y_n = Σ_g s_g · c · scale(n, g) · (Σ_k t(n, k) · q_k) + adapter + bias

    The sum over a group is exact, groups are added in float32 in their order; adapters and bias are float32, as
    always, and so is everything else: :func:`lora_linear`, gradients, quantization. A row's bits depend on no
    other row, whatever their number. A NaN or infinity makes its row NaN. The error, measured: docs/int8.md.

    It holds for the calling thread alone, all of its asyncio tasks included. Blocks may overlap in any order: the
    thread rounds until the last of them has ended. Code under torch.compile obeys the thread's state when it runs.

    Raises RuntimeError where a block ends in another thread than the one that entered it. Raises where a layer runs
    within the block:
        RuntimeError: something requires a gradient and gradients are enabled; a tensor that is not on the CPU, or
            another backend than "cpu"; no AVX512-VNNI, AVX-VNNI or dot products of NEON beside the instruction set
            in use (``backends.report()["int8"]``).
        ValueError: a weight whose in_features are no multiple of its blocksize.

    Source: groups and bytes as in llama.cpp's IQ4_NL products with Q8_0, an unsigned table as in ik_llama.cpp.

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> w = lk.quantize_4bit(torch.randn(32, 64))
        >>> if lk.backends.report()["int8"]:
        ...     with torch.no_grad(), lk.int8_activations():
        ...         y = lk.linear_4bit(torch.randn(16, 64), w)
    """
    host, thread = backends.host_module(), threading.get_ident()
    state.blocks = getattr(state, "blocks", 0) + 1
    state.active = True
    host.int8_set(True)
    try:
        yield
    finally:
        if threading.get_ident() != thread:
            raise RuntimeError(
                "int8_activations: expected the block to end in the thread that entered it; that thread goes on "
                "rounding activations"
            )
        state.blocks -= 1
        if state.blocks == 0:
            state.active = False
            host.int8_set(False)


def check(x: torch.Tensor, w: Weight4bit, needs_grad: bool) -> None:
    """Raises if int8 activations cannot be had here, where they were asked for. (The kernels ask for the CPU.)"""
    if x.is_meta:
        return
    if needs_grad:
        raise RuntimeError(
            "int8_activations: for inference only, but an input requires a gradient; "
            "use torch.no_grad() or torch.inference_mode()"
        )
    backends.check_cpu_kernels("int8_activations", x)
    if w.shape[-1] % w.blocksize:
        raise ValueError(
            f"w: expected in_features that are a multiple of the blocksize {w.blocksize} under "
            f"int8_activations, got {w.shape[-1]}"
        )
