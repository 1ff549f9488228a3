"""What int8 activations cost in accuracy, on a real model: the error of each of its layers, and its perplexity.

``python -m bench.int8_error [--model DIR] [--tokens N]``. SmolLM2-135M (the demo's model) is quantized to NF4 with
double quantization and reads the demo's corpus. Every layer's output is compared with the product in float64 of the
same inputs and the same 4-bit weight; the errors are relative, ||y - exact|| / ||exact||.
"""

from __future__ import annotations

import argparse
import math
import pathlib

import torch

import lowrank_kernels as lk
from lowrank_kernels.cli import corpus, models


def relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


def layer_errors(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Layer -> the error of its exact product (float32 sums alone) and with int8 activations, on its real inputs."""
    errors = {}

    def look(name: str):
        def hook(layer, inputs, output):
            weight = layer.dequantize(torch.float32).double()
            exact = inputs[0].double() @ weight.T
            if layer.bias is not None:
                exact += layer.bias.double()
            with lk.int8_activations():
                rounded = lk.linear_4bit(inputs[0], layer.weight4bit, layer.bias)
            errors[name] = relative(output, exact), relative(rounded, exact)

        return hook

    hooks = [
        module.register_forward_hook(look(name))
        for name, module in model.named_modules()
        if isinstance(module, lk.Linear4bit)
    ]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return errors


def read(
    model: torch.nn.Module, ids: torch.Tensor, context: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token but the first of pieces of ``context``: -log p, and the token that the model expected most."""
    losses, likeliest = [], []
    for piece in ids[0].split(context):
        logits = model(input_ids=piece[None], use_cache=False).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="none"))
        likeliest.append(logits.argmax(1))
    return torch.cat(losses), torch.cat(likeliest)


def perplexity(losses: torch.Tensor) -> float:
    return math.exp(losses.mean())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=pathlib.Path, help="a local Hugging Face model; default: SmolLM2"
    )
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    model, tokenizer, name = models.load(args.model)
    text = "\n".join(f"{row['prompt']} {row['response']}" for rows in corpus.load() for row in rows)
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : args.tokens]
    dense = perplexity(read(model, ids)[0])
    lk.replace_linear(model, progress=False)
    print(f"{name}, {ids.shape[1]} tokens, {lk.backends.report()['int8']}")

    kinds: dict[str, list[tuple[float, float]]] = {}
    for layer, found in layer_errors(model, ids[:, :512]).items():
        kinds.setdefault(layer.rpartition(".")[2], []).append(found)
    print(
        f"\n{'layers':12} {'number':>6} {'float32, median':>16} {'int8, median':>13} {'int8, largest':>14}"
    )
    for kind, found in kinds.items():
        exact, rounded = torch.tensor(found, dtype=torch.float64).T
        print(
            f"{kind:12} {len(found):6} {exact.median():16.1e} {rounded.median():13.2%} {rounded.max():14.2%}"
        )

    losses, likeliest = read(model, ids)
    with lk.int8_activations():
        int8_losses, int8_likeliest = read(model, ids)
    exact, rounded = perplexity(losses), perplexity(int8_losses)
    same = (likeliest == int8_likeliest).double().mean().item()
    print(
        f"\nperplexity: dense {dense:.3f}, 4 bits {exact:.3f} ({exact / dense - 1:+.2%}), ", end=""
    )
    print(f"4 bits and int8 {rounded:.3f} ({rounded / exact - 1:+.2%} on 4 bits)")
    print(f"the likeliest next token is the same for {same:.1%} of the tokens")


if __name__ == "__main__":
    main()
