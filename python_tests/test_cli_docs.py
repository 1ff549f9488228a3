"""docs/cli.md: its commands run, and it knows every option."""

from __future__ import annotations

import argparse
import pathlib
import re
import shlex

import pytest

import lowrank_kernels as lk
import lowrank_kernels.cli as cli
import tiny_llama
from lowrank_kernels.benchmark import providers

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
PREFIX = "python -m lowrank_kernels "


def commands(text: str) -> list[list[str]]:
    lines = [line.strip() for line in text.splitlines()]
    return [shlex.split(line.removeprefix(PREFIX)) for line in lines if line.startswith(PREFIX)]


def subparsers() -> dict[str, argparse.ArgumentParser]:
    top = cli.parser()
    [action] = [a for a in top._actions if isinstance(a, argparse._SubParsersAction)]
    return action.choices


@pytest.mark.parametrize("name", ["quantize", "bench", "doctor", "demo"])
def test_the_page_knows_every_option(name):
    section = PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]
    options = {o for action in subparsers()[name]._actions for o in action.option_strings}
    mentioned = set(re.findall(r"(--[a-z][a-z-]*)", section))
    assert options - {"-h", "--help"} - mentioned == set()
    assert mentioned - options == set()


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers", reason="quantize builds models of transformers")
    tiny_llama.save(tmp_path / "models" / "llama", ["a b c d e f g"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(providers, "MAX_COPIES", 2)
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    ran = []
    for command in commands("\n".join(blocks)):
        arguments = cli.parser().parse_args(command)
        if command[0] == "demo" or (command[0] == "doctor" and command[1:]):
            continue  # test_cli.py runs them
        if "--isa" in command and not set(arguments.isa) <= set(lk.backends.isas()):
            continue  # of another CPU
        assert cli.run(arguments) == 0
        ran.append(command[0])
    assert ran.count("quantize") == 3 and {"bench", "doctor"} <= set(ran)
    assert (tmp_path / "report.json").is_file()


@pytest.mark.parametrize("name", ["quantize", "bench"])
def test_the_examples_of_the_help_are_arguments(name):
    examples = commands(subparsers()[name].format_help())
    assert len(examples) > 1
    for command in examples:
        cli.parser().parse_args(command)
