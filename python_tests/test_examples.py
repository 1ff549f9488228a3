"""Every public function, class and method has an example in its docstring, and the examples run."""

from __future__ import annotations

import doctest
import inspect

import pytest
from torch import nn

import lowrank_kernels as lk


def exported() -> dict[str, object]:
    """What ``lowrank_kernels`` and the sub-packages that it imports later export, by name."""
    found: dict[str, object] = {}
    for package, prefix in [(lk, ""), *((getattr(lk, name), f"{name}.") for name in lk._LATER)]:
        for name in package.__all__:
            try:
                found[f"{prefix}{name}"] = getattr(package, name)
            except ImportError:  # of another library that is not installed
                continue
    return found


def documented() -> dict[str, object]:
    """Functions, classes and the public methods of these, by name.

    Properties are shown in the example of their class. What overrides a method of another library is that library's to
    explain, and a protocol has nothing to run.
    """
    found: dict[str, object] = {}
    for name, thing in exported().items():
        if getattr(thing, "_is_protocol", False):
            continue
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        found[name] = thing
        if inspect.isclass(thing):
            for method, value in vars(thing).items():
                function = getattr(value, "__func__", value)
                bases = [b for b in thing.__mro__[1:] if not b.__module__.startswith(lk.__name__)]
                theirs = any(hasattr(base, method) for base in [nn.Linear, *bases])
                own = not method.startswith("_") and not theirs
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


def test_everything_public_has_an_example():
    assert set(documented()) - set(WITH_EXAMPLES) == set(), "write an example into the docstring"
