"""The examples in the docstrings of everything public run; what has none yet is listed here."""

from __future__ import annotations

import doctest
import inspect

import pytest
from torch import nn

import lowrank_kernels as lk

# Public names without an example. Write one and take the name away; a new name does not go in here.
LACKING = {
    "AdapterBank",
    "AdapterBank.evict",
    "AdapterBank.for_model",
    "AdapterBank.load",
    "AdapterBank.module_names",
    "AdapterBank.nbytes",
    "AdapterBank.trainable",
    "AdapterBank.using",
    "Linear4bit",
    "Linear4bit.W_q",
    "Linear4bit.blocksize",
    "Linear4bit.compute_dtype",
    "Linear4bit.dequantize",
    "Linear4bit.double_quant",
    "Linear4bit.from_linear",
    "Linear4bit.from_weight",
    "Linear4bit.merged",
    "Linear4bit.quant_type",
    "Linear4bit.weight4bit",
    "LoRALinear4bit",
    "LoRALinear4bit.active_adapter",
    "LoRALinear4bit.adapter_modules",
    "LoRALinear4bit.adapter_parameters",
    "LoRALinear4bit.add_adapter",
    "LoRALinear4bit.delete_adapter",
    "LoRALinear4bit.disable_adapters",
    "LoRALinear4bit.enable_adapters",
    "LoRALinear4bit.from_linear",
    "LoRALinear4bit.in_force",
    "LoRALinear4bit.merge",
    "LoRALinear4bit.set_adapter",
    "LoRALinear4bit.shard_of_adapter",
    "LoRALinear4bit.unmerge",
    "LoRALinear4bit.whole_adapter",
    "Weight4bit.bits_per_weight",
    "Weight4bit.device",
    "Weight4bit.double_quant",
    "Weight4bit.nbytes",
    "Weight4bit.op_args",
    "batch_invariant",
    "int8_activations",
    "linear_4bit",
    "lora_linear",
    "lora_linear_4bit",
    "multi_lora_",
    "replace_linear",
}


def documented() -> dict[str, object]:
    """What ``lowrank_kernels`` exports, and the public methods and properties of its classes, by name."""
    found: dict[str, object] = {}
    for name in lk.__all__:
        try:
            thing = getattr(lk, name)
        except ImportError:  # of another library that is not installed
            continue
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        found[name] = thing
        if inspect.isclass(thing):
            for method, value in vars(thing).items():
                function = value.fget if isinstance(value, property) else value
                function = getattr(function, "__func__", function)
                own = not method.startswith("_") and not hasattr(nn.Linear, method)
                if own and inspect.isfunction(function):
                    found[f"{name}.{method}"] = function
    return found


def examples_of(name: str) -> list[doctest.DocTest]:
    thing = documented()[name]
    finder = doctest.DocTestFinder(recurse=False, exclude_empty=True)
    return [test for test in finder.find(thing, name, globs={}) if test.examples]


WITH_EXAMPLES = [name for name in documented() if examples_of(name)]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for test in examples_of(name):
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        report: list[str] = []
        runner.run(test, out=report.append)
        assert not runner.failures, "".join(report)


def test_what_lacks_an_example_is_listed():
    lacking = set(documented()) - set(WITH_EXAMPLES)
    assert lacking - LACKING == set(), "write an example into the docstring"
    assert LACKING & set(WITH_EXAMPLES) == set(), "these have one now: take them off the list"
