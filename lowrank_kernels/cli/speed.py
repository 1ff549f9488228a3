"""Tokens per second of the whole model: dense, bitsandbytes and ours, all with an adapter."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from ..nn import LoRALinear4bit

PREFILL, DECODE = 256, 8  # tokens per timed call
MEASURES = (f"prefill {PREFILL}", "decode", "train step")
OURS = "lowrank_kernels"


def peers(dense: torch.nn.Module, ours: torch.nn.Module, rank: int) -> dict[str, object]:
    """name -> model with a fresh PEFT adapter, or why there is none (str). Uses ``dense`` up."""
    try:
        import peft
    except ImportError:
        return {name: "needs peft" for name in ("dense float32 + PEFT", "bitsandbytes + PEFT")}
    replaced = [name for name, m in ours.named_modules() if isinstance(m, LoRALinear4bit)]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=replaced)
    found: dict[str, object] = {}
    try:
        found["bitsandbytes + PEFT"] = peft.get_peft_model(_bitsandbytes(dense, ours), config)
    except ImportError:
        found["bitsandbytes + PEFT"] = "needs bitsandbytes"
    except _Unsupported as error:
        found["bitsandbytes + PEFT"] = str(error)
    found["dense float32 + PEFT"] = peft.get_peft_model(dense, config)
    return dict(reversed(found.items()))


class _Unsupported(Exception):
    pass


def _bitsandbytes(dense: torch.nn.Module, ours: torch.nn.Module) -> torch.nn.Module:
    """A copy of ``dense`` with bitsandbytes' layers over the very bytes that ``ours`` holds."""
    import bitsandbytes as bnb

    model = copy.deepcopy(dense)
    for name, module in ours.named_modules():
        if not isinstance(module, LoRALinear4bit):
            continue
        if bnb.functional.has_avx512bf16() and module.in_features % module.weight4bit.blocksize:
            raise _Unsupported("with AVX512_BF16 it takes only in_features in whole blocks")
        entries = module.weight4bit.to_bitsandbytes("weight")
        packed = entries.pop("weight")
        state = {key.removeprefix("weight."): value for key, value in entries.items()}
        layer = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=torch.float32,
            quant_type=module.weight4bit.quant_type,
            device="meta",
        )
        layer.weight = bnb.nn.Params4bit.from_prequantized(
            packed, state, device="cpu", module=layer
        )
        if module.bias is not None:
            layer.bias = torch.nn.Parameter(module.bias.detach().clone(), requires_grad=False)
        model.set_submodule(name, layer)
    model.is_loaded_in_4bit = True  # what makes PEFT choose its bitsandbytes layer
    return model


def measure(
    models: dict[str, object], batch: dict[str, torch.Tensor], seconds: float, rounds: int = 3
) -> dict[str, dict[str, float] | str]:
    """name -> {measure: median tokens/s}; a reason stays one. Models take turns in every round.

    Stops after ``rounds``, or after the first round that ends past ``seconds``.
    """
    present = {name: model for name, model in models.items() if not isinstance(model, str)}
    calls = {name: _calls(model, batch) for name, model in present.items()}
    rates = {name: {m: [] for m in MEASURES} for name in present}
    start = time.perf_counter()
    with tqdm(total=rounds * len(present) * len(MEASURES), desc="Timing", unit="run") as bar:
        for _ in range(rounds):
            for name, of_model in calls.items():
                for m, call in of_model.items():
                    rates[name][m].append(call())
                    bar.update()
            if time.perf_counter() - start > seconds:
                bar.total = bar.n
                break
    return {
        name: models[name]
        if name not in present
        else {m: statistics.median(values) for m, values in rates[name].items()}
        for name in models
    }


def _calls(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, Callable]:
    """Per measure a function that runs it once and returns tokens per second."""
    ids = batch["input_ids"].flatten()
    ids = ids.repeat(-(-PREFILL // ids.numel()))[None, :PREFILL]
    model(input_ids=ids[:, :8])  # buffers and thread pools come into being at the first call
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0)  # all of a step but movement

    @torch.no_grad()
    def prefill() -> float:
        model.eval()
        start = time.perf_counter()
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return PREFILL / (time.perf_counter() - start)

    @torch.no_grad()
    def decode() -> float:
        model.eval()
        out = model(input_ids=ids[:, :32], use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(DECODE):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        return DECODE / (time.perf_counter() - start)

    def train_step() -> float:
        model.train()
        start = time.perf_counter()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return int(batch["attention_mask"].sum()) / (time.perf_counter() - start)

    return dict(zip(MEASURES, (prefill, decode, train_step)))
