"""The implementations compared. A provider makes, of a Case, one call per copy of the weight.

All 4-bit providers read the same bytes: NF4, blocks of 64, double quantization; dense weights hold
the values of these bytes. A provider that cannot run here raises :class:`Unavailable` with the
reason, which the results keep.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

import lowrank_kernels as lk
from lowrank_kernels import huge_pages, reference
from lowrank_kernels.schema import ops

from . import machine
from .case import BLOCKSIZE, Case

Calls = list[Callable[[], object]]
SCALING = 2.0
MAX_COPIES = 128


class Unavailable(Exception):
    """Why a provider cannot run a case here."""


@contextlib.contextmanager
def precision(name: str):
    """``torch.set_float32_matmul_precision(name)`` within the block; by "medium" float32 may be rounded to bfloat16.

    Raises RuntimeError for "medium" where this library has no such products.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        if name == "medium" and lk.backends.products(torch.float32) != torch.bfloat16:
            raise RuntimeError("the instruction set has no products of bfloat16 numbers")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# -- tensors ---------------------------------------------------------------------------------------


def copies(case: Case, nbytes: int) -> int:
    """How many weights of ``nbytes`` take turns; hot: 1.

    On a CPU five fourths of the largest cache, at least 40 MiB more than it, and one more; on a GPU three times its
    L2; at least two. No more than MAX_COPIES, so a matrix of a few kB is never cold; no case is so small.
    """
    if case.cache == "hot":
        return 1
    if case.device == "cuda":
        wanted = -(-3 * machine.l2_bytes() // max(1, nbytes))
    else:
        cache = machine.last_level_cache_bytes()
        wanted = 1 + -(-max(5 * cache // 4, cache + (40 << 20)) // max(1, nbytes))
    return min(MAX_COPIES, max(2, wanted))


def random_tensor(
    *shape: int, dtype=torch.float32, seed: int = 0, scale: float = 1.0, device: str = "cpu"
) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)


@functools.lru_cache(maxsize=1)
def weight_of(N: int, K: int, device: str) -> lk.Weight4bit:
    """The matrix of every case of this shape; one shape is held at a time.

    Quantized on the CPU for every device: what is compared must not hang on what is measured.
    """
    dense = random_tensor(N, K, scale=K**-0.5, device=device).cpu()
    return lk.quantize_4bit(dense, "nf4", BLOCKSIZE, double_quant=True).to(device)


@functools.lru_cache(maxsize=1)
def dense_weight(N: int, K: int, device: str) -> torch.Tensor:
    """The same matrix in float32, by the reference."""
    return reference.dequantize_4bit(*weight_of(N, K, device).op_args())


@functools.lru_cache(maxsize=1)
def _dense_copies(
    N: int, K: int, device: str, dtype: torch.dtype, count: int
) -> list[torch.Tensor]:
    return [dense_weight(N, K, device).to(dtype, copy=True) for _ in range(count)]


@functools.lru_cache(maxsize=1)
def _copies_4bit(N: int, K: int, device: str, count: int) -> list[lk.Weight4bit]:
    w, copied = weight_of(N, K, device), []
    for _ in range(count):
        tensors = {name: t.clone() for name, t in w.tensors().items()}
        huge_pages.advise(tensors["packed"])  # as a layer does
        copied.append(dataclasses.replace(w, **tensors))
    return copied


def dense_weights(case: Case) -> list[torch.Tensor]:
    """Copies of the dense weight in the case's dtype, each in memory of its own."""
    count = copies(case, case.N * case.K * case.torch_dtype.itemsize)
    return _dense_copies(case.N, case.K, case.device, case.torch_dtype, count)


def weights_4bit(case: Case) -> list[lk.Weight4bit]:
    """Copies of the 4-bit weight, each in memory of its own, as if quantized from case.dtype."""
    copied = _copies_4bit(case.N, case.K, case.device, copies(case, case.weight_bytes))
    return [dataclasses.replace(w, dtype=case.torch_dtype) for w in copied]


def x_of(case: Case) -> torch.Tensor:
    return random_tensor(case.M, case.K, dtype=case.torch_dtype, seed=1, device=case.device)


def dy_of(case: Case) -> torch.Tensor:
    return random_tensor(case.M, case.N, dtype=case.torch_dtype, seed=2, device=case.device)


def adapter_of(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """A [R, K] and B [N, R] in float32, as PEFT keeps them for every base."""
    (N, K, R), device = (case.N, case.K, case.R), case.device
    return (
        random_tensor(R, K, seed=3, scale=K**-0.5, device=device).requires_grad_(),
        random_tensor(N, R, seed=4, scale=0.01, device=device).requires_grad_(),
    )


def each(case: Case, activations: torch.Tensor, weights: list) -> list[tuple]:
    """(activations, weight) for every weight; on a GPU the activations are copies as well."""
    if case.device == "cuda":
        return [(activations.clone(), weight) for weight in weights]
    return [(activations, weight) for weight in weights]


def call_each(case: Case, function: Callable, activations: torch.Tensor, weights: list) -> Calls:
    """``function(activations, weight)`` for every weight."""
    return [functools.partial(function, *pair) for pair in each(case, activations, weights)]


def provider(
    function: Callable, activations: Callable, weights: Callable
) -> Callable[[Case], Calls]:
    """What makes the calls ``function(activations, weight)`` of a case."""
    return lambda case: call_each(case, function, activations(case), weights(case))


# -- bitsandbytes ----------------------------------------------------------------------------------


def bitsandbytes(device: str):
    """The package. Raises Unavailable where it is missing, too old, or without code for ``device``."""
    try:
        import bitsandbytes
        from bitsandbytes.cextension import lib
    except Exception as error:  # its import also fails on broken installations
        raise Unavailable(f"bitsandbytes: {error}") from None
    if tuple(int(part) for part in bitsandbytes.__version__.split(".")[:2]) < (0, 50):
        raise Unavailable(f"bitsandbytes {bitsandbytes.__version__} is older than 0.50")
    if device == "cuda" and not lib.compiled_with_cuda:
        raise Unavailable("bitsandbytes: its CUDA library could not be loaded")
    return bitsandbytes


def bnb_weight(w: lk.Weight4bit) -> tuple[torch.Tensor, object]:
    """(packed, QuantState) over the very bytes of ``w``."""
    entries = w.to_bitsandbytes("weight")
    packed = entries.pop("weight")
    state = {key.removeprefix("weight."): value for key, value in entries.items()}
    QuantState = bitsandbytes(packed.device.type).functional.QuantState
    return packed, QuantState.from_dict(state, packed.device)


def bnb_weights(case: Case) -> list[tuple[torch.Tensor, object]]:
    return [bnb_weight(w) for w in weights_4bit(case)]


def bnb_dequantize(packed: torch.Tensor, state: object) -> torch.Tensor:
    return bitsandbytes(packed.device.type).functional.dequantize_4bit(packed, state)


def bnb_linear(w: lk.Weight4bit, compute_dtype: torch.dtype) -> torch.nn.Module:
    """bitsandbytes' Linear4bit, without bias, over the very bytes of ``w``."""
    packed, state = bnb_weight(w)
    (N, K), nn = w.shape, bitsandbytes(packed.device.type).nn
    layer = nn.Linear4bit(
        K, N, bias=False, compute_dtype=compute_dtype, quant_type=w.quant_type, device="meta"
    )
    layer.weight = nn.Params4bit(
        packed, requires_grad=False, quant_state=state, bnb_quantized=True, module=layer
    )
    layer.quant_state = state
    return layer


def bnb_modules(case: Case) -> list[torch.nn.Module]:
    return [bnb_linear(w, case.torch_dtype) for w in weights_4bit(case)]


# -- linear_4bit: y = x Wᵀ, and linear_4bit_dx: dx = dy W ------------------------------------------

linear_lowrank = provider(lk.linear_4bit, x_of, weights_4bit)
linear_torch = provider(F.linear, x_of, dense_weights)
linear_dequantize = provider(lambda x, w: F.linear(x, w.dequantize(x.dtype)), x_of, weights_4bit)
dx_lowrank = provider(lambda dy, w: ops.linear_4bit_dx(dy, *w.op_args()), dy_of, weights_4bit)
dx_torch = provider(torch.matmul, dy_of, dense_weights)
dx_dequantize = provider(lambda dy, w: dy @ w.dequantize(dy.dtype), dy_of, weights_4bit)
# The line that bitsandbytes' MatMul4Bit.backward consists of.
dx_bitsandbytes = provider(lambda dy, w: dy @ bnb_dequantize(*w).to(dy.dtype), dy_of, bnb_weights)


@functools.lru_cache(maxsize=1)
def _bnb_inference(case: Case) -> list[torch.nn.Module]:
    """:func:`bnb_modules` in evaluation mode. ``case`` has M = 1, so that others share them.

    On a CPU with bfloat16 units the first call repacks the weight, which takes its time.
    """
    modules = [module.eval() for module in bnb_modules(case)]
    for module in modules:
        module(x_of(case))
    return modules


def linear_bitsandbytes(case: Case) -> Calls:
    """Its Linear4bit in evaluation mode; on a GPU the function that this consists of."""
    if case.device == "cuda":
        matmul = bitsandbytes(case.device).matmul_4bit
        return call_each(case, lambda x, w: matmul(x, *w), x_of(case), bnb_weights(case))
    x = x_of(case)
    return [functools.partial(m, x) for m in _bnb_inference(dataclasses.replace(case, M=1))]


# -- lora_linear_4bit: forward, or forward and all gradients ---------------------------------------


def lora_calls(case: Case, layers: list[tuple[Callable, list[torch.Tensor]]]) -> Calls:
    """Per (layer, parameters): ``layer(x)``, with the gradients of x and parameters if asked."""
    if not case.op.endswith("fwd_bwd"):
        pairs = each(case, x_of(case), layers)
        return [torch.no_grad()(functools.partial(layer, x)) for x, (layer, _) in pairs]

    def gradients(layer, parameters, x, dy):
        return torch.autograd.grad(layer(x), [x, *parameters], dy)

    triples = each(case, dy_of(case), each(case, x_of(case), layers))
    return [
        functools.partial(gradients, *layer, x.detach().requires_grad_(), dy)
        for dy, (x, layer) in triples
    ]


def _lora(forward: Callable) -> Callable[[Case], Calls]:
    """``forward(x, w, A, B)`` of every 4-bit weight."""

    def calls(case: Case) -> Calls:
        A, B = adapter_of(case)
        layers = [lambda x, w=w: forward(x, w, A, B) for w in weights_4bit(case)]
        return lora_calls(case, [(layer, [A, B]) for layer in layers])

    return calls


def _dequantize_forward(x, w, A, B):
    delta = SCALING * F.linear(F.linear(x.to(A.dtype), A), B)
    return F.linear(x, w.dequantize(x.dtype)) + delta.to(x.dtype)


lora_lowrank = _lora(lambda x, w, A, B: lk.lora_linear_4bit(x, w, A, B, SCALING))
lora_dequantize = _lora(_dequantize_forward)


def peft():
    """The package. Raises Unavailable where it is missing."""
    try:
        import peft
    except ImportError as error:
        raise Unavailable(f"peft: {error}") from None
    return peft


def _peft_calls(case: Case, bases: list[torch.nn.Module], in_4bit: bool) -> Calls:
    options = {"r": case.R, "lora_alpha": int(SCALING * case.R), "target_modules": ["base"]}
    layers = []
    for base in bases:
        model = torch.nn.ModuleDict({"base": base})
        model.is_loaded_in_4bit = in_4bit  # what makes PEFT choose its bitsandbytes layer
        layer = peft().inject_adapter_in_model(peft().LoraConfig(**options), model)["base"]
        adapter = [p for p in layer.parameters() if p.requires_grad]
        # float32 and the same values as ours: get_peft_model keeps adapters in float32 as well
        for parameter, value in zip(adapter, adapter_of(case)):
            parameter.data = value.detach()
        if case.device == "cuda":  # as people train: PEFT alone multiplies adapters in float32
            layer = torch.autocast("cuda", case.torch_dtype)(layer.forward)
        layers.append((layer, adapter))
    return lora_calls(case, layers)


def lora_peft_dense(case: Case) -> Calls:
    bases = []
    for weight in dense_weights(case):
        base = torch.nn.Linear(case.K, case.N, bias=False, device="meta")
        base.weight = torch.nn.Parameter(weight, requires_grad=False)
        bases.append(base)
    return _peft_calls(case, bases, in_4bit=False)


def lora_peft_bitsandbytes(case: Case) -> Calls:
    return _peft_calls(case, bnb_modules(case), in_4bit=True)
