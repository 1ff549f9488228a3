"""What a :class:`RoleModel` is made of: a model that was checked, heads, adapters of files, a bank of all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import nn

from .. import backends
from ..adapter_bank import AdapterBank
from ..adapter_files import assign
from ..adapter_format import ReadAdapter, read_adapter
from ..arguments import ceil_div
from ..linear4bit import Linear4bit
from ..named_adapters import NamedAdapters, adapted_layers
from ..paths import named_modules, some

ROLES = ("policy", "reference", "value", "reward")
TRAINED = ("policy", "value")


def check_model(model: nn.Module) -> None:
    """Raises unless it is a causal language model with 4-bit layers and without dropout."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear) or not hasattr(model, "base_model"):
        raise TypeError(
            "model: expected a causal language model of transformers (AutoModelForCausalLM), got "
            f"{type(model).__name__}"
        )
    if not any(isinstance(layer, Linear4bit | NamedAdapters) for layer in model.modules()):
        raise ValueError(
            "model: expected its linear layers in 4 bits (lowrank_kernels.replace_linear(model, r=0)), got none"
        )
    drops = [
        path
        for path, module in named_modules(model)
        if (isinstance(module, nn.modules.dropout._DropoutNd) and module.p)
        or any(_is_rate(getattr(module, name, 0)) for name in ("attention_dropout", "dropout"))
    ]
    if drops:
        raise ValueError(
            f"model: expected no dropout, since a policy's first ratio must be 1, got some in {some(drops)}; load the "
            "model with its dropout rates, such as attention_dropout, set to 0"
        )


def _is_rate(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and value > 0


def head_of_language(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Hidden states to logits as the model does it, which one small forward confirms."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        y = head(hidden)
        y = y if scale == 1 else y * scale
        return cap * torch.tanh(y / cap) if cap else y

    training = model.training
    model.eval()
    with torch.no_grad():
        ids = torch.tensor([[0, 1]], device=head.weight.device)
        expected = model(input_ids=ids, use_cache=False).logits.float()
        found = logits(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    model.train(training)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=2e-2, atol=2e-2):
        raise ValueError(
            f"model: expected logits that are the head of the last hidden state, got others from {type(model).__name__}"
        )
    return logits


def one_kernel(device: torch.device) -> contextlib.AbstractContextManager:
    """Within the block a layer runs on the CPU kernel of large batches whatever its rows are: a sequence then has the
    same bits in any batch."""
    if device.type != "cpu" or backends.active() not in ("cpu", "cuda"):
        return contextlib.nullcontext()
    return backends.use_kernel(list(backends.kernels()["forward"])[-1])


def scalar_head(
    file: ReadAdapter | None, folder: object, width: int, device: torch.device
) -> nn.Linear:
    """The head of a file, or a new one of standard deviation 1 / sqrt(width + 1)."""
    head = nn.Linear(width, 1, bias=False, device=device, dtype=torch.float32)
    if file is None:
        nn.init.normal_(head.weight, std=(width + 1) ** -0.5)
        return head
    if list(file.heads) != ["score.weight"] or file.heads["score.weight"].shape != (1, width):
        found = {path: tuple(tensor.shape) for path, tensor in file.heads.items()}
        raise ValueError(
            f"{folder}: expected an adapter with a head of one score, score.weight (1, {width}), got {found or 'none'}"
        )
    with torch.no_grad():
        head.weight.copy_(file.heads["score.weight"])
    return head


def add_as_read(layers: dict[str, NamedAdapters], name: str, file: ReadAdapter) -> None:
    taken = [path for path, layer in layers.items() if name in layer.r]
    if taken:
        raise ValueError(f"model: expected no adapter {name!r}, which {some(taken)} have")
    for path, adapter in file.layers.items():
        adapter.lora_dropout = 0.0
        assign(layers[path], name, adapter)


def bank_of(model: nn.Module, folders: dict[str, str]) -> AdapterBank:
    """A bank of the model's own adapters, which then live in its pages, and of the frozen ones in ``folders``."""
    layers = adapted_layers(model)
    files = {role: read_adapter(layers, folder, model) for role, folder in folders.items()}
    used = {path for file in files.values() for path in file.layers}
    used |= {path for path, layer in layers.items() if layer.r.keys() & set(TRAINED)}
    ranks = [max(layer.r[name] for layer in layers.values() if name in layer.r) for name in TRAINED]
    ranks += [max(adapter.r for adapter in file.layers.values()) for file in files.values()]
    pages = sum(ceil_div(rank, 8) for rank in ranks)
    bank = AdapterBank({path: layers[path] for path in layers if path in used}, pages)
    for name in TRAINED:
        bank.load(name)
    for role, folder in folders.items():
        bank.load(role, folder)
    return bank
