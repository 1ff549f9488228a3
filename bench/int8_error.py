"""What int8 activations cost in accuracy, on a real model: the error of each of its layers, and its perplexity.

``python -m bench.int8_error``. SmolLM2-135M (the demo's model) is quantized to NF4 with double quantization and reads
4096 tokens of the demo's corpus. Every layer's output is compared with the product in float64 of the same inputs and
the same 4-bit weight; the errors are relative, ||y - exact|| / ||exact||.
"""

from __future__ import annotations

import contextlib
import functools

import torch

import lowrank_kernels as lk
from lowrank_kernels.benchmark.report import plain
from lowrank_kernels.cli import corpus, models

TOKENS, CONTEXT = 4096, 512


def relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


def layer_errors(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, list[tuple[float, float]]]:
    """Kind of layer -> the errors of its layers, exact (float32 sums alone) and with int8 activations."""
    errors: dict[str, list[tuple[float, float]]] = {}

    def look(kind: str, layer, inputs, output):
        exact = inputs[0].double() @ layer.dequantize(torch.float32).double().T
        exact += 0 if layer.bias is None else layer.bias.double()
        with lk.int8_activations():
            rounded = lk.linear_4bit(inputs[0], layer.weight4bit, layer.bias)
        errors.setdefault(kind, []).append((relative(output, exact), relative(rounded, exact)))

    with contextlib.ExitStack() as hooks:
        for name, layer in model.named_modules():
            if isinstance(layer, lk.Linear4bit):
                hook = functools.partial(look, name.rpartition(".")[2])
                hooks.enter_context(layer.register_forward_hook(hook))
        model(input_ids=ids, use_cache=False)
    return errors


def read(model: torch.nn.Module, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The perplexity of pieces of CONTEXT tokens, and the token that the model expected most at each place."""
    losses, likeliest = [], []
    for piece in ids[0].split(CONTEXT):
        logits = model(input_ids=piece[None], use_cache=False).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="none"))
        likeliest.append(logits.argmax(1))
    return torch.cat(losses).mean().exp().item(), torch.cat(likeliest)


@torch.no_grad()
def main() -> None:
    model, tokenizer, name = models.load()
    text = "\n".join(f"{row['prompt']} {row['response']}" for rows in corpus.load() for row in rows)
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :TOKENS]
    dense, _ = read(model, ids)
    lk.replace_linear(model, progress=False)
    rows = [["layers", "number", "float32, median", "int8, median", "int8, largest"]]
    for kind, found in layer_errors(model, ids[:, :CONTEXT]).items():
        exact, rounded = torch.tensor(found, dtype=torch.float64).T
        numbers = f"{exact.median():.1e}", f"{rounded.median():.2%}", f"{rounded.max():.2%}"
        rows.append([kind, str(len(found)), *numbers])
    exact, likeliest = read(model, ids)
    with lk.int8_activations():
        rounded, int8_likeliest = read(model, ids)
    same = (likeliest == int8_likeliest).double().mean().item()
    print(
        f"{name}, {ids.shape[1]} tokens, {lk.backends.report()['int8']}\n\n{plain(rows, left=1)}\n"
    )
    print(f"perplexity: dense {dense:.3f}, 4 bits {exact:.3f} ({exact / dense - 1:+.2%}), ", end="")
    print(f"4 bits and int8 {rounded:.3f} ({rounded / exact - 1:+.2%} on 4 bits)")
    print(f"the likeliest next token is the same for {same:.1%} of the tokens")


if __name__ == "__main__":
    main()
