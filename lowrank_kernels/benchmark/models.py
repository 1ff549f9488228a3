"""A whole model as a case, in training, prefill and decode: dense, with bitsandbytes and ours, all with LoRA."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable

import torch

import lowrank_kernels as lk

from . import check, providers
from .providers import Calls, Unavailable

OURS, DENSE, BITSANDBYTES = "lowrank_kernels", "torch + PEFT", "bitsandbytes + PEFT"
PROBE = 8  # tokens that a model is checked on
TOLERANCE = 0.1  # of the norm of its logits; bitsandbytes multiplies in bfloat16 on some CPUs
PREFILL, DECODE, CONTEXT = 256, 8, 32  # tokens of a call; before the first one that is decoded
PHASES = ("train", "prefill", "decode")

Batch = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """A model in one of PHASES; ``tokens``: how many a call handles, which rates are made of."""

    model: str
    phase: str
    tokens: int
    dtype: str = "float32"
    R: int = 16
    device: str = "cpu"
    op: str = "model"

    def document(self) -> dict:
        """What a result document says of this case."""
        return dataclasses.asdict(self)

    def rate(self, result: dict) -> dict[str, float]:
        return {"tokens_per_second": self.tokens / result["median_ms"] * 1e3}

    def verify(self, outputs: list[torch.Tensor]) -> None:
        """Raises Wrong unless losses or logits are finite; :func:`model_providers` has compared the logits by then."""
        if not all(bool(output.isfinite().all()) for output in outputs):
            raise check.Wrong("wrong result: a loss or logit is not finite")


def cases(model: str, batch: Batch, dtype: str, rank: int, device: str) -> list[ModelCase]:
    tokens = dict(zip(PHASES, (int(batch["attention_mask"].sum()), PREFILL, DECODE)))
    return [ModelCase(model, phase, tokens[phase], dtype, rank, device) for phase in PHASES]


def random_batch(vocabulary: int, device: str, rows: int = 4, length: int = 128) -> Batch:
    """Random tokens, all of which count in the loss."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (rows, length), generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


# -- the models ------------------------------------------------------------------------------------


def contenders(
    dense: torch.nn.Module, rank: int, peers: tuple[str, ...], ours: torch.nn.Module | None = None
) -> dict[str, torch.nn.Module | str]:
    """name -> model with an adapter of PEFT's, or why there is none. Uses ``dense`` up.

    ``ours``: a copy of it that has this library's layers already; by default it is made. ``peers``: "torch",
    "bitsandbytes".
    """
    if ours is None:
        ours = copy.deepcopy(dense)
        lk.replace_linear(ours, r=rank, lora_alpha=2 * rank, progress=False)
    found: dict[str, torch.nn.Module | str] = {OURS: ours}
    for name, base in ((DENSE, lambda: dense), (BITSANDBYTES, lambda: _bitsandbytes(ours))):
        if name.split()[0] in peers:
            try:
                found[name] = _with_peft(base(), ours, rank)
            except Unavailable as reason:
                found[name] = str(reason)
    return found


def _layers(model: torch.nn.Module) -> dict[str, lk.LoRALinear4bit]:
    return {n: m for n, m in model.named_modules() if isinstance(m, lk.LoRALinear4bit)}


def _with_peft(model: torch.nn.Module, ours: torch.nn.Module, rank: int) -> torch.nn.Module:
    peft, names = providers.peft(), list(_layers(ours))
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
    return peft.get_peft_model(model, config)


def _bitsandbytes(ours: torch.nn.Module) -> torch.nn.Module:
    """A copy of ``ours`` with bitsandbytes' layers over the same bytes."""
    model = copy.deepcopy(ours)
    for name, layer in _layers(model).items():
        weight = layer.weight4bit
        bnb = providers.bitsandbytes(weight.packed.device.type)
        on_cpu = weight.packed.device.type == "cpu"
        if on_cpu and bnb.functional.has_avx512bf16() and weight.shape[1] % weight.blocksize:
            raise Unavailable("with AVX512_BF16 it takes only in_features in whole blocks")
        replaced = providers.bnb_linear(weight, weight.dtype)
        if layer.bias is not None:
            replaced.bias = torch.nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        model.set_submodule(name, replaced)
    model.is_loaded_in_4bit = True  # what makes PEFT choose its bitsandbytes layer
    return model


# -- their calls -----------------------------------------------------------------------------------


def model_providers(
    models: dict[str, torch.nn.Module | str], batch: Batch
) -> dict[str, Callable[[ModelCase], Calls]]:
    """name -> what makes the call of a case.

    It raises Unavailable where there is no model, and Wrong where the logits of one in 4 bits are not those of the
    reference, without adapters.
    """
    probe = batch["input_ids"][:1, :PROBE]

    @functools.cache
    def expected() -> torch.Tensor:
        with lk.backends.use("reference"):
            return _base_logits(models[OURS], probe)

    def calls(name: str, case: ModelCase) -> Calls:
        model = models[name]
        if isinstance(model, str):
            raise Unavailable(model)
        if name != DENSE:
            error = (_base_logits(model, probe) - expected()).norm() / expected().norm()
            if not error < TOLERANCE:
                raise check.Wrong(
                    f"wrong logits: relative error {error:.2g}, allowed is {TOLERANCE}"
                )
        return [_CALLS[case.phase](model, batch)]

    return {name: functools.partial(calls, name) for name in models}


def _base_logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Without its adapters: those of PEFT are fresh, and add zeros.

    The embeddings require a gradient, without which bitsandbytes would lay out its weights for inference for good.
    """
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with lk.disable_adapters(model) if _layers(model) else contextlib.nullcontext():
        logits = model.eval()(inputs_embeds=embedded, use_cache=False).logits
    return logits.detach().float()


def _train(model: torch.nn.Module, batch: Batch) -> Callable[[], torch.Tensor]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0)  # all of a step but movement

    def step() -> torch.Tensor:
        model.train()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _prompt(batch: Batch, length: int) -> torch.Tensor:
    ids = batch["input_ids"].flatten()
    return ids.repeat(-(-length // ids.numel()))[None, :length]


def _prefill(model: torch.nn.Module, batch: Batch) -> Callable[[], torch.Tensor]:
    ids = _prompt(batch, PREFILL)

    @torch.no_grad()
    def prefill() -> torch.Tensor:
        return model.eval()(input_ids=ids, use_cache=True, logits_to_keep=1).logits

    return prefill


class _Decode:
    """Greedy decoding of DECODE tokens, after a prompt that is read before each call."""

    def __init__(self, model: torch.nn.Module, batch: Batch):
        self.model, self.ids = model.eval(), _prompt(batch, CONTEXT)

    @torch.no_grad()
    def prepare(self) -> None:
        self.out = self.model.eval()(input_ids=self.ids, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        for _ in range(DECODE):
            token = self.out.logits[:, -1:].argmax(-1)
            past = self.out.past_key_values
            self.out = self.model(input_ids=token, past_key_values=past, use_cache=True)
        return self.out.logits


_CALLS = {"train": _train, "prefill": _prefill, "decode": _Decode}
