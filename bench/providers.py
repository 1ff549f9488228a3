"""The implementations compared. A provider makes, of a Case, one call per copy of the weight.

All 4-bit providers read the same bytes: NF4, blocks of 64, double quantization. A provider that
cannot run here raises :class:`Unavailable` with the reason, which the results keep.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

import lowrank_kernels as lk
from lowrank_kernels.cli import machine
from lowrank_kernels.schema import ops

from .cases import BLOCKSIZE, Case

Calls = list[Callable[[], object]]
SCALING = 2.0
MAX_COPIES = 64


class Unavailable(Exception):
    """Why a provider cannot run a case here."""


# -- tensors ---------------------------------------------------------------------------------------


def copies(case: Case, nbytes: int) -> int:
    """How many weights of ``nbytes`` take turns: twice the largest cache and one more; hot: 1.

    No more than MAX_COPIES, so a matrix of a few kB is never cold; no case of the suite is so small.
    """
    if case.cache == "hot":
        return 1
    wanted = 1 + -(-2 * machine.last_level_cache_bytes() // max(1, nbytes))
    return min(MAX_COPIES, max(2, wanted))


def _random(*shape: int, dtype=torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


@functools.lru_cache(maxsize=1)
def _weight(N: int, K: int) -> tuple[torch.Tensor, lk.Weight4bit]:
    """The matrix of every case of this shape, dense and in 4 bits; one shape is held at a time."""
    dense = _random(N, K, scale=K**-0.5)
    return dense, lk.quantize_4bit(dense, "nf4", BLOCKSIZE, double_quant=True)


@functools.lru_cache(maxsize=1)
def _dense_copies(N: int, K: int, dtype: torch.dtype, count: int) -> list[torch.Tensor]:
    weight = _weight(N, K)[0].to(dtype)
    return [weight.clone() for _ in range(count)]


@functools.lru_cache(maxsize=1)
def _copies_4bit(N: int, K: int, count: int) -> list[lk.Weight4bit]:
    w = _weight(N, K)[1]
    return [
        dataclasses.replace(w, **{name: t.clone() for name, t in w.tensors().items()})
        for _ in range(count)
    ]


def dense_weights(case: Case) -> list[torch.Tensor]:
    """Copies of the dense weight in the case's dtype, each in memory of its own."""
    count = copies(case, case.N * case.K * case.torch_dtype.itemsize)
    return _dense_copies(case.N, case.K, case.torch_dtype, count)


def weights_4bit(case: Case) -> list[lk.Weight4bit]:
    """Copies of the 4-bit weight, each in memory of its own, as if quantized from case.dtype."""
    count = copies(case, case.weight_bytes)
    return [
        dataclasses.replace(w, dtype=case.torch_dtype) for w in _copies_4bit(case.N, case.K, count)
    ]


def x_of(case: Case) -> torch.Tensor:
    return _random(case.M, case.K, dtype=case.torch_dtype, seed=1)


def dy_of(case: Case) -> torch.Tensor:
    return _random(case.M, case.N, dtype=case.torch_dtype, seed=2)


def adapter_of(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """A [R, K] and B [N, R] in float32, as PEFT keeps them for every base."""
    return (
        _random(case.R, case.K, seed=3, scale=case.K**-0.5).requires_grad_(),
        _random(case.N, case.R, seed=4, scale=0.01).requires_grad_(),
    )


def _bitsandbytes():
    try:
        import bitsandbytes
    except Exception as error:  # its import also fails on broken installations
        raise Unavailable(f"bitsandbytes: {error}") from None
    return bitsandbytes


def _bnb_weights(case: Case) -> list[tuple[torch.Tensor, object]]:
    """(packed, QuantState) over the same bytes as :func:`weights_4bit`."""
    QuantState = _bitsandbytes().functional.QuantState
    pairs = []
    for w in weights_4bit(case):
        entries = w.to_bitsandbytes("weight")
        packed = entries.pop("weight")
        state = {key.removeprefix("weight."): value for key, value in entries.items()}
        pairs.append((packed, QuantState.from_dict(state, torch.device("cpu"))))
    return pairs


def _bnb_modules(case: Case) -> list[torch.nn.Module]:
    """bitsandbytes' Linear4bit over each of :func:`_bnb_weights`."""
    nn, modules = _bitsandbytes().nn, []
    for packed, state in _bnb_weights(case):
        module = nn.Linear4bit(
            case.K, case.N, bias=False, compute_dtype=case.torch_dtype, device="meta"
        )
        module.weight = nn.Params4bit(
            packed, requires_grad=False, quant_state=state, bnb_quantized=True, module=module
        )
        module.quant_state = state
        modules.append(module)
    return modules


# -- linear_4bit: y = x Wᵀ -------------------------------------------------------------------------


def linear_lowrank(case: Case) -> Calls:
    x = x_of(case)
    return [functools.partial(lk.linear_4bit, x, w) for w in weights_4bit(case)]


def linear_torch(case: Case) -> Calls:
    x = x_of(case)
    return [functools.partial(F.linear, x, w) for w in dense_weights(case)]


def linear_dequantize(case: Case) -> Calls:
    x = x_of(case)
    return [lambda w=w: F.linear(x, w.dequantize(x.dtype)) for w in weights_4bit(case)]


def linear_bitsandbytes(case: Case) -> Calls:
    """Its Linear4bit in evaluation mode; with bfloat16 units its first call repacks the weight."""
    x = x_of(case)
    modules = [module.eval() for module in _bnb_modules(case)]
    for module in modules:
        module(x)
    return [functools.partial(module, x) for module in modules]


# -- linear_4bit_dx: dx = dy W ---------------------------------------------------------------------


def dx_lowrank(case: Case) -> Calls:
    dy = dy_of(case)
    return [lambda w=w: ops.linear_4bit_dx(dy, *w.op_args()) for w in weights_4bit(case)]


def dx_torch(case: Case) -> Calls:
    dy = dy_of(case)
    return [functools.partial(torch.matmul, dy, w) for w in dense_weights(case)]


def dx_dequantize(case: Case) -> Calls:
    dy = dy_of(case)
    return [lambda w=w: dy @ w.dequantize(dy.dtype) for w in weights_4bit(case)]


def dx_bitsandbytes(case: Case) -> Calls:
    """The line that bitsandbytes' MatMul4Bit.backward consists of."""
    dequantize, dy = _bitsandbytes().functional.dequantize_4bit, dy_of(case)
    return [
        lambda p=packed, s=state: torch.matmul(dy, dequantize(p, s).to(dy.dtype))
        for packed, state in _bnb_weights(case)
    ]


# -- lora_linear_4bit: forward, or forward and all gradients ---------------------------------------


def _lora_calls(case: Case, layers: list[tuple[Callable, list[torch.Tensor]]]) -> Calls:
    """Per (layer, parameters): ``layer(x)``, with the gradients of x and parameters if asked."""
    x, dy = x_of(case), dy_of(case)
    if case.op == "lora_linear_4bit":
        return [torch.no_grad()(functools.partial(layer, x)) for layer, _ in layers]
    x.requires_grad_()

    def gradients(layer, parameters):
        return torch.autograd.grad(layer(x), [x, *parameters], dy)

    return [functools.partial(gradients, *layer) for layer in layers]


def lora_lowrank(case: Case) -> Calls:
    A, B = adapter_of(case)
    layers = [lambda x, w=w: lk.lora_linear_4bit(x, w, A, B, SCALING) for w in weights_4bit(case)]
    return _lora_calls(case, [(layer, [A, B]) for layer in layers])


def lora_dequantize(case: Case) -> Calls:
    A, B = adapter_of(case)

    def forward(x, w):
        delta = SCALING * F.linear(F.linear(x.to(A.dtype), A), B)
        return F.linear(x, w.dequantize(x.dtype)) + delta.to(x.dtype)

    layers = [lambda x, w=w: forward(x, w) for w in weights_4bit(case)]
    return _lora_calls(case, [(layer, [A, B]) for layer in layers])


def _peft_calls(case: Case, bases: list[torch.nn.Module], in_4bit: bool) -> Calls:
    try:
        import peft
    except ImportError as error:
        raise Unavailable(f"peft: {error}") from None
    config = peft.LoraConfig(r=case.R, lora_alpha=int(SCALING * case.R), target_modules=["base"])
    layers = []
    for base in bases:
        model = torch.nn.ModuleDict({"base": base})
        model.is_loaded_in_4bit = in_4bit  # what makes PEFT choose its bitsandbytes layer
        layer = peft.inject_adapter_in_model(config, model)["base"]
        adapter = [p for p in layer.parameters() if p.requires_grad]
        # float32 and the same values as ours: get_peft_model keeps adapters in float32 as well
        for parameter, value in zip(adapter, adapter_of(case)):
            parameter.data = value.detach()
        layers.append((layer, adapter))
    return _lora_calls(case, layers)


def lora_peft_dense(case: Case) -> Calls:
    bases = []
    for weight in dense_weights(case):
        base = torch.nn.Linear(case.K, case.N, bias=False, device="meta")
        base.weight = torch.nn.Parameter(weight, requires_grad=False)
        bases.append(base)
    return _peft_calls(case, bases, in_4bit=False)


def lora_peft_bitsandbytes(case: Case) -> Calls:
    return _peft_calls(case, _bnb_modules(case), in_4bit=True)


# -- quantize_4bit, dequantize_4bit ----------------------------------------------------------------


def quantize_lowrank(case: Case) -> Calls:
    return [functools.partial(lk.quantize_4bit, weight) for weight in dense_weights(case)]


def quantize_bitsandbytes(case: Case) -> Calls:
    quantize = _bitsandbytes().functional.quantize_4bit
    options = {"blocksize": BLOCKSIZE, "quant_type": "nf4", "compress_statistics": True}
    return [functools.partial(quantize, weight, **options) for weight in dense_weights(case)]


def dequantize_lowrank(case: Case) -> Calls:
    return [functools.partial(w.dequantize, case.torch_dtype) for w in weights_4bit(case)]


def dequantize_bitsandbytes(case: Case) -> Calls:
    dequantize = _bitsandbytes().functional.dequantize_4bit
    return [functools.partial(dequantize, packed, state) for packed, state in _bnb_weights(case)]
