"""What int8 activations cost in accuracy, on a real model: the error of each of its layers, and its perplexity.
And what products in bfloat16 cost, of a bfloat16 model.

``python -m bench.int8_error``. SmolLM2-135M (the demo's model) is quantized to NF4 with double quantization and reads
the demo's corpus. Every layer's output is compared with the product in float64 of the same inputs and the same 4-bit
weight; the errors are relative, ||y - exact|| / ||exact||.
"""

from __future__ import annotations

import copy
import functools

import torch

import lowrank_kernels as lk
from lowrank_kernels.benchmark.report import plain
from lowrank_kernels.cli import corpus, models

TOKENS, CONTEXT = 4096, 512

Errors = dict[str, list[tuple[float, float]]]


def note_errors(errors: Errors, kind: str, layer: lk.Linear4bit, inputs, y) -> None:
    """Adds to those of ``kind`` the layer's errors with float32 sums alone and with int8 activations."""
    (x,) = inputs
    exact = x.double() @ layer.dequantize(torch.float32).double().T
    exact += 0 if layer.bias is None else layer.bias.double()
    with lk.int8_activations():
        rounded = lk.linear_4bit(x, layer.weight4bit, layer.bias)
    found = [((out.double() - exact).norm() / exact.norm()).item() for out in (y, rounded)]
    errors.setdefault(kind, []).append(tuple(found))


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
    exact, likeliest = read(model, ids)
    with lk.int8_activations():
        rounded, int8_likeliest = read(model, ids)
    half = copy.deepcopy(model).bfloat16()
    half_rounded, _ = read(half, ids)
    with lk.backends.exact():
        half_exact, _ = read(half, ids)
    errors: Errors = {}
    for path, layer in model.named_modules():
        if isinstance(layer, lk.Linear4bit):
            hook = functools.partial(note_errors, errors, path.rpartition(".")[2])
            layer.register_forward_hook(hook)
    model(input_ids=ids[:, :CONTEXT], use_cache=False)
    rows = [["layers", "number", "float32, median", "int8, median", "int8, largest"]]
    for kind, found in errors.items():
        ours, int8 = torch.tensor(found, dtype=torch.float64).T
        numbers = f"{ours.median():.1e}", f"{int8.median():.2%}", f"{int8.max():.2%}"
        rows.append([kind, str(len(found)), *numbers])
    print(f"{name}, {ids.shape[1]} tokens, {lk.backends.report()['int8']}\n\n{plain(rows, left=1)}")
    print(
        f"\nperplexity: dense {dense:.3f}, 4 bits {exact:.3f} ({exact / dense - 1:+.2%}), ", end=""
    )
    print(f"4 bits and int8 {rounded:.3f} ({rounded / exact - 1:+.2%} on 4 bits)")
    change = f"{half_rounded:.3f} ({half_rounded / half_exact - 1:+.2%})"
    print(f"in bfloat16: exact products {half_exact:.3f}, products of bfloat16 numbers {change}")
    same = (likeliest == int8_likeliest).double().mean().item()
    print(f"the likeliest next token is the same for {same:.1%} of the tokens")


if __name__ == "__main__":
    main()
