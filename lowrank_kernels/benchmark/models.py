"""A whole model as a case, in training, prefill and decode: ours, dense and with bitsandbytes, all with LoRA.

All contenders have the same 4-bit weights, the dense one their values, and the same adapters. What the first call of
each gives is compared with a dense model in float32 before it is timed: in training, the gradients of all adapters.

Training comes first: on a CPU with bfloat16 units bitsandbytes repacks its weights at the first call in evaluation
mode, and no gradient passes them from then on. Such a model trains twice as fast, and wrongly; the check refuses it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F

import lowrank_kernels as lk

from . import check, providers
from .case import ModelCase
from .harness import Provider, with_medium
from .ops import OURS
from .providers import Calls, Unavailable

PEFT, FUSED = f"{OURS} + PEFT", f"{OURS}, fused"
DENSE, BITSANDBYTES = "torch + PEFT", "bitsandbytes + PEFT"
ROWS, LENGTH = 2, 256  # of a training step
PREFILL, DECODE, CONTEXT = 256, 8, 32  # tokens of a call; before the first one that is decoded
TOKENS = {"train": ROWS * LENGTH, "prefill": PREFILL, "decode": DECODE}
# Of the norm of logits, and of each adapter's gradient, where all products are float32; elsewhere the second, or the
# third times the error that a dense model in bfloat16 makes there.
EXACT, ROUNDED, TIMES = 1e-3, 0.05, 6.0

# Shapes of models with random weights; a name ends in the number of layers. The vocabulary is small, so that a few
# layers are not outweighed by the head, which is dense for all.
SHAPES = {
    "tinyllama": {"hidden_size": 2048, "intermediate_size": 5632, "heads": 32, "kv_heads": 4},
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "heads": 32, "kv_heads": 8},
}
VOCABULARY = 2048

Batch = dict[str, torch.Tensor]


def cases(
    model: str, dtype: str, rank: int, device: str, train: int = TOKENS["train"]
) -> list[ModelCase]:
    """``train``: the tokens of a training step."""
    tokens = TOKENS | {"train": train}
    return [ModelCase(model, phase, tokens[phase], dtype, rank, device) for phase in TOKENS]


def random_batch(vocabulary: int, device: str, rows: int = ROWS, length: int = LENGTH) -> Batch:
    """Random tokens, all of which count in the loss."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (rows, length), generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def random_shape(name: str) -> tuple[dict, int] | None:
    """(entry of SHAPES, layers) of a name such as "tinyllama-4"; None for another name."""
    shape, _, layers = name.rpartition("-")
    known = shape in SHAPES and layers.isdecimal() and int(layers) > 0
    return (SHAPES[shape], int(layers)) if known else None


def random_model(name: str) -> torch.nn.Module:
    """A Llama of :func:`random_shape` with random weights, the same ones each time."""
    import transformers

    shape, layers = random_shape(name)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        num_hidden_layers=layers,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)


# -- the models ------------------------------------------------------------------------------------


def contenders(
    dense: torch.nn.Module, rank: int, names: Iterable[str], ours: torch.nn.Module | None = None
) -> dict[str, torch.nn.Module | str]:
    """name -> model, or why there is none. Uses ``dense`` up.

    ``ours``: a copy of it that has this library's layers already; by default it is made, with adapters that are not 0.
    """
    if ours is None:
        ours = copy.deepcopy(dense)
        lk.replace_linear(ours, r=rank, lora_alpha=2 * rank, progress=False)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in adapters(ours).items():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    make = {  # the dense one last: its weights change
        PEFT: lambda: _with_peft(_of_layers(ours, _linear), ours, rank),
        FUSED: lambda: _fused(dense, rank),
        BITSANDBYTES: lambda: _with_peft(_bitsandbytes(ours), ours, rank),
        DENSE: lambda: _with_peft(_dense(dense, ours), ours, rank),
    }
    found: dict[str, torch.nn.Module | str] = {OURS: ours}
    for name in make:
        if name in names:
            try:
                found[name] = _same_adapters(make[name](), ours)
            except Unavailable as reason:
                found[name] = str(reason)
    return found


def _same_adapters(model: torch.nn.Module, ours: torch.nn.Module) -> torch.nn.Module:
    values = adapters(ours)
    for name, parameter in adapters(model).items():
        parameter.data.copy_(values[name].data)
    return model


def layers(model: torch.nn.Module) -> dict[str, lk.LoRALinear4bit]:
    return {n: m for n, m in model.named_modules() if isinstance(m, lk.LoRALinear4bit)}


def adapters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters of all adapters, by the names that they have without PEFT's wrapper."""
    return {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def _of_layers(ours: torch.nn.Module, make: Callable) -> torch.nn.Module:
    """A copy of ``ours`` with ``make(layer)`` in the place of each of its 4-bit layers."""
    model = copy.deepcopy(ours)
    for name, layer in layers(model).items():
        model.set_submodule(name, make(layer))
    return model


def _linear(layer: lk.LoRALinear4bit) -> lk.Linear4bit:
    return lk.Linear4bit.from_weight(layer.weight4bit, layer.bias)


def _dense(dense: torch.nn.Module, ours: torch.nn.Module) -> torch.nn.Module:
    """``dense`` with the values of the 4-bit weights."""
    for name, layer in layers(ours).items():
        weight = dense.get_submodule(name).weight
        weight.data.copy_(layer.weight4bit.dequantize(weight.dtype))
    return dense


def _fused(dense: torch.nn.Module, rank: int) -> torch.nn.Module:
    """Our layers, with one call for those that share an input."""
    model = copy.deepcopy(dense)
    lk.replace_linear(model, r=rank, lora_alpha=2 * rank, progress=False, fuse=True)
    return model


def _bitsandbytes(ours: torch.nn.Module) -> torch.nn.Module:
    """A copy of ``ours`` with bitsandbytes' layers over the same bytes."""

    def make(layer: lk.LoRALinear4bit) -> torch.nn.Module:
        weight, device = layer.weight4bit, layer.weight.device.type
        bnb = providers.bitsandbytes(device)
        ragged = weight.shape[1] % weight.blocksize
        if device == "cpu" and ragged and bnb.functional.has_avx512bf16():
            raise Unavailable("with AVX512_BF16 it takes only in_features in whole blocks")
        made = providers.bnb_linear(weight, weight.dtype)
        if layer.bias is not None:
            made.bias = torch.nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        return made

    model = _of_layers(ours, make)
    model.is_loaded_in_4bit = True  # what makes PEFT choose its bitsandbytes layer
    return model


def _with_peft(model: torch.nn.Module, ours: torch.nn.Module, rank: int) -> torch.nn.Module:
    peft, names = providers.peft(), list(layers(ours))
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
    return peft.get_peft_model(model, config)


class _Reference(torch.nn.Module):
    """``x Wᵀ + bias + scaling · x Aᵀ Bᵀ`` in float32, by torch alone."""

    def __init__(self, layer: lk.LoRALinear4bit):
        super().__init__()
        self.register_buffer("W", layer.weight4bit.dequantize(torch.float32))
        self.lora_A, self.lora_B = layer.lora_A, layer.lora_B
        self.scaling, self.bias = layer.scaling["default"], layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down, up = self.lora_A["default"].weight, self.lora_B["default"].weight
        return F.linear(x, self.W, self.bias) + self.scaling * F.linear(F.linear(x, down), up)


# -- their calls -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Contest:
    """Contenders, and the batch that they read."""

    models: dict[str, torch.nn.Module | str]
    batch: Batch

    @functools.cached_property
    def expected(self) -> dict[str, dict[str, tuple[torch.Tensor, float]]]:
        """By phase, of each result by its name: what float32 makes of it, and how far off that is in bfloat16.

        Deep in a real model some gradients are little more than rounding.
        """
        model = _of_layers(self.models[OURS], _Reference).float()
        with providers.precision("highest"):
            exact = _results(model, self.batch)
            weights = [b for name, b in model.named_buffers() if name.endswith(".W")]
            for tensor in (*model.parameters(), *weights):
                tensor.data = tensor.data.bfloat16()
            rounded = _results(model, self.batch)
        return {
            phase: {
                n: (t, float(check.relative_error(rounded[phase][n], t))) for n, t in of.items()
            }
            for phase, of in exact.items()
        }

    def calls(self, name: str, case: ModelCase) -> Calls:
        """The call of a case; it gives tensors by their names. Raises Unavailable where there is no model."""
        model = self.models[name]
        if isinstance(model, str):
            raise Unavailable(model)
        return [_CALLS[case.phase](model, self.batch)]

    def verify(self, name: str, case: ModelCase, outputs: list[dict]) -> float:
        """The largest relative error. Raises Wrong for one that rounding does not explain, or a missing gradient."""
        wanted, largest = self.expected[case.phase], 0.0
        rounds = name == BITSANDBYTES and case.phase != "train"  # its inference kernel
        rounds |= case.dtype != "float32" or torch.get_float32_matmul_precision() == "medium"
        for output in outputs:
            if missing := sorted(wanted.keys() - output.keys()):
                raise check.Wrong(f"{len(missing)} gradients are missing, such as {missing[0]}")
            for key, (exact, rounding) in wanted.items():
                allowed = max(ROUNDED, TIMES * rounding) if rounds else EXACT
                error = check.within([check.relative_error(output[key], exact)], allowed, key)
                largest = max(largest, error)
        return largest

    def provider(self, name: str) -> Provider:
        return provider(name, lambda: self)


def provider(
    name: str, contest: Callable[[], Contest], context: Callable = contextlib.nullcontext
) -> Provider:
    """The contender ``name`` of a contest that is made when it is asked for."""
    return Provider(
        lambda case: contest().calls(name, case),
        context,
        verify=lambda case, outputs: contest().verify(name, case, outputs),
    )


_open: dict[Callable, Contest] = {}  # the last one


def _opened(make: Callable[[], Contest]) -> Contest:
    """What ``make`` makes; one contest is held at a time."""
    if make not in _open:
        _open.clear()
        _open[make] = make()
    return _open[make]


def entries(
    name: str,
    load: Callable[[], torch.nn.Module],
    columns: dict[str, tuple[str, Callable]],
    dtype: str = "float32",
    rank: int = 16,
    device: str = "cpu",
    medium: bool = False,
) -> Iterator[tuple[ModelCase, dict[str, Provider]]]:
    """Each phase and who computes it. ``columns``: the contender and the context of each column of the results;
    ``medium``: see :func:`with_medium`."""

    def make() -> Contest:
        dense = load().to(device=device, dtype=getattr(torch, dtype))
        batch = random_batch(dense.get_input_embeddings().num_embeddings, device)
        return Contest(contenders(dense, rank, {who for who, _ in columns.values()}), batch)

    contest = functools.partial(_opened, make)
    found = {column: provider(who, contest, context) for column, (who, context) in columns.items()}
    for case in cases(name, dtype, rank, device):
        yield case, with_medium(found) if medium and dtype == "float32" else found


def _train(model: torch.nn.Module, batch: Batch) -> Callable[[], dict[str, torch.Tensor]]:
    """A step of AdamW, all of it but movement; gives the loss and all gradients."""
    parameters = adapters(model.train())
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.0, weight_decay=0.0)

    def step() -> dict[str, torch.Tensor]:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        optimizer.zero_grad()
        return {"loss": loss.detach()} | gradients

    return step


def _prompt(batch: Batch, length: int) -> torch.Tensor:
    ids = batch["input_ids"].flatten()
    return ids.repeat(-(-length // ids.numel()))[None, :length]


def _prefill(model: torch.nn.Module, batch: Batch) -> Callable[[], dict[str, torch.Tensor]]:
    model, ids = model.eval(), _prompt(batch, PREFILL)

    @torch.no_grad()
    def prefill() -> dict[str, torch.Tensor]:
        return {"logits": model(input_ids=ids, use_cache=True, logits_to_keep=1).logits}

    return prefill


class _Decode:
    """Decoding of DECODE tokens, the same ones for all models, after a prompt that is read before each call."""

    def __init__(self, model: torch.nn.Module, batch: Batch):
        self.model, ids = model.eval(), _prompt(batch, CONTEXT + DECODE)
        self.prompt, self.tokens = ids[:, :CONTEXT], ids[:, CONTEXT:].split(1, 1)

    @torch.no_grad()
    def prepare(self) -> None:
        self.past = self.model(input_ids=self.prompt, use_cache=True).past_key_values

    @torch.no_grad()
    def __call__(self) -> dict[str, torch.Tensor]:
        for token in self.tokens:
            out = self.model(input_ids=token, past_key_values=self.past, use_cache=True)
        return {"logits": out.logits}


_CALLS = {"train": _train, "prefill": _prefill, "decode": _Decode}


def _results(model: torch.nn.Module, batch: Batch) -> dict[str, dict[str, torch.Tensor]]:
    """What the call of each phase gives."""
    found = {}
    for phase, make in _CALLS.items():
        call = make(model, batch)
        getattr(call, "prepare", lambda: None)()
        found[phase] = call()
    return found
