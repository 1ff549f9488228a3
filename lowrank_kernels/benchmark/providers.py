"""The implementations compared. A provider makes, of a Case, one call per copy of the weight.

All 4-bit providers read the same bytes: NF4, blocks of 64, double quantization; dense weights hold
the values of these bytes. A provider that cannot run here raises :class:`Unavailable` with the
reason, which the results keep.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

import lowrank_kernels as lk
from lowrank_kernels import reference
from lowrank_kernels.cli import machine
from lowrank_kernels.codebooks import code_of, dynamic_code
from lowrank_kernels.schema import ops
from lowrank_kernels.triton import installed as triton_installed
from lowrank_kernels.triton import kernel_of

from . import cuda
from .case import BLOCKSIZE, Case

Calls = list[Callable[[], object]]
SCALING = 2.0
MAX_COPIES = 128
MAX_SMALL_COPIES = 5000  # where cases are small and providers few


class Unavailable(Exception):
    """Why a provider cannot run a case here."""


# -- tensors ---------------------------------------------------------------------------------------


def copies(case: Case, nbytes: int) -> int:
    """How many weights of ``nbytes`` take turns; hot: 1.

    On a CPU five fourths of the largest cache and one more, on a GPU three times its L2; at least
    two. No more than MAX_COPIES, so a matrix of a few kB is never cold; no case is so small.
    """
    if case.cache == "hot":
        return 1
    if case.device == "cuda":
        wanted = -(-3 * cuda.l2_bytes() // max(1, nbytes))
    else:
        wanted = 1 + -(-5 * machine.last_level_cache_bytes() // (4 * max(1, nbytes)))
    most = MAX_SMALL_COPIES if case.op == "linear_4bit_growth" else MAX_COPIES
    return min(most, max(2, wanted))


def _random(
    *shape: int, dtype=torch.float32, seed: int = 0, scale: float = 1.0, device: str = "cpu"
) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)


@functools.lru_cache(maxsize=1)
def _weight(N: int, K: int, device: str) -> lk.Weight4bit:
    """The matrix of every case of this shape; one shape is held at a time.

    Quantized on the CPU for every device: what is compared must not hang on what is measured.
    """
    dense = _random(N, K, scale=K**-0.5, device=device).cpu()
    return lk.quantize_4bit(dense, "nf4", BLOCKSIZE, double_quant=True).to(device)


@functools.lru_cache(maxsize=1)
def dense_weight(N: int, K: int, device: str) -> torch.Tensor:
    """The same matrix in float32, by the reference."""
    return reference.dequantize_4bit(*_weight(N, K, device).op_args())


@functools.lru_cache(maxsize=1)
def _dense_copies(
    N: int, K: int, device: str, dtype: torch.dtype, count: int
) -> list[torch.Tensor]:
    return [dense_weight(N, K, device).to(dtype, copy=True) for _ in range(count)]


@functools.lru_cache(maxsize=1)
def _copies_4bit(N: int, K: int, device: str, count: int) -> list[lk.Weight4bit]:
    w = _weight(N, K, device)
    return [
        dataclasses.replace(w, **{name: t.clone() for name, t in w.tensors().items()})
        for _ in range(count)
    ]


def dense_weights(case: Case) -> list[torch.Tensor]:
    """Copies of the dense weight in the case's dtype, each in memory of its own."""
    count = copies(case, case.N * case.K * case.torch_dtype.itemsize)
    return _dense_copies(case.N, case.K, case.device, case.torch_dtype, count)


def weights_4bit(case: Case) -> list[lk.Weight4bit]:
    """Copies of the 4-bit weight, each in memory of its own, as if quantized from case.dtype."""
    copied = _copies_4bit(case.N, case.K, case.device, copies(case, case.weight_bytes))
    return [dataclasses.replace(w, dtype=case.torch_dtype) for w in copied]


def x_of(case: Case) -> torch.Tensor:
    return _random(case.M, case.K, dtype=case.torch_dtype, seed=1, device=case.device)


def dy_of(case: Case) -> torch.Tensor:
    return _random(case.M, case.N, dtype=case.torch_dtype, seed=2, device=case.device)


def adapter_of(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """A [R, K] and B [N, R] in float32, as PEFT keeps them for every base."""
    return (
        _random(case.R, case.K, seed=3, scale=case.K**-0.5, device=case.device).requires_grad_(),
        _random(case.N, case.R, seed=4, scale=0.01, device=case.device).requires_grad_(),
    )


def each(case: Case, activations: torch.Tensor, weights: list) -> list[tuple]:
    """(activations, weight) for every weight; on a GPU the activations are copies as well."""
    if case.device == "cuda":
        return [(activations.clone(), weight) for weight in weights]
    return [(activations, weight) for weight in weights]


def _bitsandbytes(device: str):
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


def _bnb_weights(case: Case) -> list[tuple[torch.Tensor, object]]:
    """(packed, QuantState) over the same bytes as :func:`weights_4bit`."""
    QuantState = _bitsandbytes(case.device).functional.QuantState
    pairs = []
    for w in weights_4bit(case):
        entries = w.to_bitsandbytes("weight")
        packed = entries.pop("weight")
        state = {key.removeprefix("weight."): value for key, value in entries.items()}
        pairs.append((packed, QuantState.from_dict(state, torch.device(case.device))))
    return pairs




def bnb_dequantize(packed: torch.Tensor, state: object) -> torch.Tensor:
    return _bitsandbytes(packed.device.type).functional.dequantize_4bit(packed, state)


def _bnb_modules(case: Case) -> list[torch.nn.Module]:
    """bitsandbytes' Linear4bit over each of :func:`_bnb_weights`."""
    nn, modules = _bitsandbytes(case.device).nn, []
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
    pairs = each(case, x_of(case), weights_4bit(case))
    return [functools.partial(lk.linear_4bit, x, w) for x, w in pairs]


def linear_torch(case: Case) -> Calls:
    pairs = each(case, x_of(case), dense_weights(case))
    return [functools.partial(F.linear, x, w) for x, w in pairs]


def linear_dequantize(case: Case) -> Calls:
    pairs = each(case, x_of(case), weights_4bit(case))
    return [lambda x=x, w=w: F.linear(x, w.dequantize(x.dtype)) for x, w in pairs]


@functools.lru_cache(maxsize=1)
def _bnb_inference(case: Case) -> list[torch.nn.Module]:
    """:func:`_bnb_modules` in evaluation mode. ``case`` has M = 1, so that others share them.

    On a CPU with bfloat16 units the first call repacks the weight, which takes its time.
    """
    modules = [module.eval() for module in _bnb_modules(case)]
    for module in modules:
        module(x_of(case))
    return modules


def linear_bitsandbytes(case: Case) -> Calls:
    """Its Linear4bit in evaluation mode; on a GPU the function that this consists of."""
    if case.device == "cuda":
        matmul = _bitsandbytes(case.device).matmul_4bit
        pairs = each(case, x_of(case), _bnb_weights(case))
        return [functools.partial(matmul, x, packed, state) for x, (packed, state) in pairs]
    x = x_of(case)
    return [functools.partial(m, x) for m in _bnb_inference(dataclasses.replace(case, M=1))]






# -- linear_4bit_dx: dx = dy W ---------------------------------------------------------------------


def dx_lowrank(case: Case) -> Calls:
    pairs = each(case, dy_of(case), weights_4bit(case))
    return [lambda dy=dy, w=w: ops.linear_4bit_dx(dy, *w.op_args()) for dy, w in pairs]


def dx_torch(case: Case) -> Calls:
    pairs = each(case, dy_of(case), dense_weights(case))
    return [functools.partial(torch.matmul, dy, w) for dy, w in pairs]


def dx_dequantize(case: Case) -> Calls:
    pairs = each(case, dy_of(case), weights_4bit(case))
    return [lambda dy=dy, w=w: dy @ w.dequantize(dy.dtype) for dy, w in pairs]


def dx_bitsandbytes(case: Case) -> Calls:
    """The line that bitsandbytes' MatMul4Bit.backward consists of."""
    pairs = each(case, dy_of(case), _bnb_weights(case))
    return [lambda dy=dy, w=w: dy @ bnb_dequantize(*w).to(dy.dtype) for dy, w in pairs]




# -- lora_linear_4bit: forward, or forward and all gradients ---------------------------------------


def _lora_calls(case: Case, layers: list[tuple[Callable, list[torch.Tensor]]]) -> Calls:
    """Per (layer, parameters): ``layer(x)``, with the gradients of x and parameters if asked."""
    if case.op == "lora_linear_4bit":
        pairs = each(case, x_of(case), layers)
        return [torch.no_grad()(functools.partial(layer, x)) for x, (layer, _) in pairs]

    def gradients(layer, parameters, x, dy):
        return torch.autograd.grad(layer(x), [x, *parameters], dy)

    triples = each(case, dy_of(case), each(case, x_of(case), layers))
    return [
        functools.partial(gradients, *layer, x.detach().requires_grad_(), dy)
        for dy, (x, layer) in triples
    ]


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
        if case.device == "cuda":  # as people train: PEFT alone multiplies adapters in float32
            layer = torch.autocast("cuda", case.torch_dtype)(layer.forward)
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










