"""The experts of one layer of a mixture-of-experts model as a case: ours, dense and with bitsandbytes' parameters.

The layer is transformers' own module with the shapes of Qwen3-30B-A3B (Qwen3 technical report, 2025): E experts of
``[2 I, H]`` and ``[H, I]``, of which each token goes to k. All contenders have the same 4-bit weights, the dense one
their values, and in training the same adapters on all experts, as PEFT's ``target_parameters`` makes them. The calls of
a case have other tokens and other experts each, so few tokens find their experts in memory.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

import lowrank_kernels as lk
from lowrank_kernels.experts import Experts4bit

from . import check, providers
from .case import Case
from .providers import SCALING, Calls, Unavailable

# PEFT's own layers over bitsandbytes' parameters add one more delta with each call (PEFT 0.21.2, bitsandbytes
# 0.50.2), so what one call computes is written here.
PEFT, BITSANDBYTES = "torch + PEFT", "bitsandbytes + PEFT's deltas"
NAMES = ("gate_up_proj", "down_proj")
CALLS = (
    16  # batches that take turns: 16 x 8 experts are all 128, if no two tokens choose the same one
)


@dataclasses.dataclass(frozen=True)
class ExpertsCase(Case):
    """``K`` is H, ``N`` is I and ``M`` the number of tokens; ``op``: "experts" or "experts_fwd_bwd"."""

    experts: int = 128
    top_k: int = 8

    @property
    def chosen(self) -> float:
        """How many experts M tokens are expected to choose, each k at random."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** self.M)

    @property
    def flops(self) -> int:
        rows = self.M * self.top_k
        base, lora = 6 * rows * self.N * self.K, 2 * rows * self.R * (3 * self.N + 2 * self.K)
        return 2 * base + 3 * lora if self.op.endswith("fwd_bwd") else base + lora

    @property
    def bytes(self) -> int:
        """Those of the chosen experts' weights, adapters and gradients, and of the tokens."""
        weights = round(3 * self.chosen * self.N * self.K * (0.5 + 1 / 64 + 4 / 64 / 256))
        adapters = round(self.chosen * self.R * (3 * self.N + 2 * self.K)) * 4
        rows = 2 * self.M * self.K * self.torch_dtype.itemsize
        if self.op.endswith("fwd_bwd"):
            return 2 * weights + 3 * adapters + 2 * rows
        return weights + adapters + rows


# -- the layer -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _stacks(case: ExpertsCase) -> dict[str, lk.Weight4bit]:
    """The weights of every contender; ``case`` has the same M, R, op and dtype for all cases of a layer."""
    shapes = {"gate_up_proj": (2 * case.N, case.K), "down_proj": (case.K, case.N)}
    found = {}
    for seed, (name, (rows, columns)) in enumerate(shapes.items()):
        dense = providers.random_tensor(
            case.experts, rows, columns, dtype=torch.bfloat16, seed=seed, scale=columns**-0.5
        )
        found[name] = lk.quantize_4bit(dense)
    return found


def stacks(case: ExpertsCase) -> dict[str, lk.Weight4bit]:
    layer = dataclasses.replace(case, M=1, R=0, op="experts", dtype="float32")
    return {
        name: dataclasses.replace(w, dtype=case.torch_dtype) for name, w in _stacks(layer).items()
    }


def _module(case: ExpertsCase) -> torch.nn.Module:
    """transformers' module, its weights on the meta device."""
    try:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import (
            Qwen3MoeConfig,
            Qwen3MoeExperts,
        )
    except ImportError as error:
        raise Unavailable(f"transformers: {error}") from None
    config = Qwen3MoeConfig(
        hidden_size=case.K,
        moe_intermediate_size=case.N,
        num_experts=case.experts,
        num_experts_per_tok=case.top_k,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        return Qwen3MoeExperts(config).requires_grad_(False)


@functools.lru_cache(maxsize=1)
def _dense_stacks(case: ExpertsCase) -> dict[str, torch.Tensor]:
    return {name: w.dequantize(case.torch_dtype) for name, w in stacks(case).items()}


def dense_layer(case: ExpertsCase) -> torch.nn.Module:
    module = _module(case)
    key = dataclasses.replace(case, M=1, R=0, op="experts")
    for name, W in _dense_stacks(key).items():
        setattr(module, name, torch.nn.Parameter(W, requires_grad=False))
    return module


def our_layer(case: ExpertsCase) -> torch.nn.Module:
    module = _module(case)
    return Experts4bit.from_weights(module, stacks(case))


def bitsandbytes_layer(case: ExpertsCase) -> torch.nn.Module:
    """bitsandbytes' parametrization over the very bytes of ours."""
    providers.bitsandbytes("cpu")
    from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized

    module = _module(case)
    for name, w in stacks(case).items():
        entries = w.to_bitsandbytes(name)
        packed = entries.pop(name)
        setattr(module, name, torch.nn.Parameter(packed, requires_grad=False))
        state = {key.removeprefix(f"{name}."): value for key, value in entries.items()}
        replace_parameter_4bit_prequantized(module, name, state, torch.device("cpu"))
    return module


# -- tokens ----------------------------------------------------------------------------------------


def batches(case: ExpertsCase) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """hidden_states [M, H], top_k_index [M, k], top_k_weights [M, k] of each call."""
    found = []
    for seed in range(CALLS if case.M <= 16 else 2):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(case.M, case.experts, generator=generator)
        weights, index = scores.softmax(-1).topk(case.top_k)
        weights = (weights / weights.sum(-1, keepdim=True)).to(case.torch_dtype)
        x = providers.random_tensor(case.M, case.K, dtype=case.torch_dtype, seed=100 + seed)
        found.append((x, index, weights))
    return found


def factors(case: ExpertsCase) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A [r E, K] and B [N, r E] of each projection, float32, in PEFT's order."""
    found = {}
    for seed, (name, w) in enumerate(stacks(case).items()):
        E, N, K = w.shape
        ranks = case.R * E
        A = providers.random_tensor(ranks, K, seed=10 + seed, scale=K**-0.5)
        B = providers.random_tensor(N, ranks, seed=20 + seed, scale=0.05)
        found[name] = A, B
    return found


# -- calls -----------------------------------------------------------------------------------------


def _forward(layer: torch.nn.Module, case: ExpertsCase) -> Calls:
    return [torch.no_grad()(functools.partial(layer, *batch)) for batch in batches(case)]


def _training(layer: torch.nn.Module, parameters: dict[str, tuple], case: ExpertsCase) -> Calls:
    """Forward, and the gradients of the tokens and of every A and B."""
    flat = [p for pair in parameters.values() for p in pair]

    def step(x, index, weights):
        x = x.detach().requires_grad_()
        y = layer(x, index, weights)
        return torch.autograd.grad(y, [x, *flat], torch.ones_like(y))

    return [functools.partial(step, *batch) for batch in batches(case)]


def _calls(make: Callable[[ExpertsCase], torch.nn.Module], adapt: Callable) -> Callable:
    def calls(case: ExpertsCase) -> Calls:
        layer = make(case)
        if not case.R:
            return _forward(layer.eval(), case)
        layer, parameters = adapt(layer, case)
        return _training(layer.train(), parameters, case)

    return calls


def _ours_adapted(layer: Experts4bit, case: ExpertsCase):
    for name, (A, B) in factors(case).items():
        stack = layer.stacks[name]
        stack.add_adapter("default", r=case.R, lora_alpha=SCALING * case.R)
        for parameter, value in zip(stack.adapter_parameters("default"), (A, B)):
            parameter.data.copy_(value)
    found = {name: stack.adapter_parameters("default") for name, stack in layer.stacks.items()}
    return layer, found


def _peft_adapted(layer: torch.nn.Module, case: ExpertsCase):
    """PEFT's layers for target_parameters, one inside of the other."""
    peft, found = providers.peft(), {}
    config = peft.LoraConfig(
        r=case.R,
        lora_alpha=int(SCALING * case.R),
        target_parameters=[f"experts.{n}" for n in NAMES],
    )
    model = torch.nn.ModuleDict({"experts": layer})
    wrapped = peft.inject_adapter_in_model(config, model)["experts"]
    inner = wrapped
    while hasattr(inner, "parameter_name"):
        name = inner.parameter_name
        found[name] = inner.lora_A["default"].weight, inner.lora_B["default"].weight
        for parameter, value in zip(found[name], factors(case)[name]):
            parameter.data = value
        inner = inner.base_layer
    return wrapped, {name: found[name] for name in NAMES}


def _bitsandbytes_adapted(layer: torch.nn.Module, case: ExpertsCase):
    """Each call dequantizes all experts and adds the adapters to them, as PEFT's parametrization does."""
    parameters = {n: [t.requires_grad_() for t in of] for n, of in factors(case).items()}
    dense, E, R = _module(case), case.experts, case.R

    class Adapted(torch.nn.Module):
        def forward(self, *batch):
            weights = {}
            for name, (A, B) in parameters.items():
                W = getattr(layer, name)
                lhs, rhs = (
                    B.view(-1, R, E).permute(2, 0, 1).to(W.dtype),
                    A.view(E, R, -1).to(W.dtype),
                )
                weights[name] = torch.baddbmm(W, lhs, rhs, alpha=SCALING)
            return torch.func.functional_call(dense, weights, batch)

    return Adapted(), parameters


ours = _calls(our_layer, _ours_adapted)
dense = _calls(dense_layer, _peft_adapted)
bitsandbytes = _calls(bitsandbytes_layer, _bitsandbytes_adapted)


# -- the check -------------------------------------------------------------------------------------

ROUNDED = {"float32": check.TOLERANCE, "bfloat16": 3e-2}  # several products, each rounded


@functools.lru_cache(maxsize=1)
def _expected(case: ExpertsCase, call: int) -> tuple[torch.Tensor, ...]:
    """What float32 makes of the first or the second call, expert by expert."""
    x, index, weights = batches(case)[call]
    x = x.float().requires_grad_(bool(case.R))
    adapters = {n: [t.clone().requires_grad_() for t in of] for n, of in factors(case).items()}
    values = stacks(case)

    def project(name: str, rows: torch.Tensor, e: int) -> torch.Tensor:
        y = rows @ values[name].narrow(0, e, 1).dequantize(torch.float32)[0].T
        if case.R:
            A, B = adapters[name]
            E, R = case.experts, case.R
            y = y + SCALING * rows @ A.view(E, R, -1)[e].T @ B.view(-1, R, E)[:, :, e].T
        return y

    y = torch.zeros_like(x)
    for e in index.unique().tolist():
        token, place = (index == e).nonzero(as_tuple=True)
        gate, up = project("gate_up_proj", x[token], e).chunk(2, -1)
        inner = project("down_proj", torch.nn.functional.silu(gate) * up, e)
        y = y.index_add(0, token, inner * weights[token, place, None].float())
    if not case.R:
        return (y.detach(),)
    flat = [t for name in NAMES for t in adapters[name]]
    return torch.autograd.grad(y, [x, *flat], torch.ones_like(y))


def verify(case: ExpertsCase, outputs: list) -> float:
    """The largest relative error of the first call's results."""
    outputs = [outputs[0] if isinstance(outputs[0], tuple) else (outputs[0],)]
    errors = [
        check.relative_error(found, wanted)
        for output in outputs
        for found, wanted in zip(output, _expected(case, 0), strict=True)
    ]
    return check.within(errors, ROUNDED[case.dtype])
