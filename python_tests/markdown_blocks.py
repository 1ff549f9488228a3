"""The code blocks of the documentation: found, run, or checked."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    str(path.relative_to(ROOT))
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
]
_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+?) -->\n+)?"
    r"(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
# Programs of other people that the documentation may call; what they do is theirs.
_KNOWN = {"cd", "docker", "git", "pip", "pytest", "torchrun"}


@dataclasses.dataclass(frozen=True)
class Block:
    page: str
    line: int  # of its first line of text, counted from 0
    language: str
    text: str
    reason: str | None  # why it is not run

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """Every fenced block of a page, in order."""
    text = read(page)
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("text"))
        code = re.sub(f"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        found.append(Block(page, line, match["language"], code, match["reason"]))
    return found


def run(page: str, names: dict[str, object]) -> dict[str, object]:
    """Runs all Python blocks of a page in one namespace that begins with ``names``; errors show the page's lines."""
    for block in blocks(page):
        if block.language == "python" and block.reason is None:
            code = "\n" * block.line + block.text
            exec(compile(code, ROOT / page, "exec", dont_inherit=True), names)
    return names


# -- commands ----------------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """The commands of a shell block, one a line, continued lines joined, without comments."""
    lines = text.replace("\\\n", " ").split("\n")
    return [line for line in lines if shlex.split(line, comments=True)]


def inline_commands(page: str) -> list[str]:
    """The commands that a page's sentences name, such as `make docs`."""
    prose = _BLOCK.sub("", read(page))
    found = re.findall(r"`((?:make|python -m (?:lowrank_kernels|bench))\b[^`]*)`", prose)
    return [" ".join(command.split()) for command in found]


def check_command(line: str) -> None:
    """AssertionError unless what the command names exists: make targets, modules, options, files."""
    words = shlex.split(line, comments=True)
    for separator in ("&&", "|", ">"):
        if separator in words:
            at = words.index(separator)
            check_command(shlex.join(words[:at]))
            return None if separator == ">" else check_command(shlex.join(words[at + 1 :]))
    while words and re.match(r"[A-Z_0-9]+=", words[0]):
        words.pop(0)
    program, *arguments = words
    if program == "make":
        _check_make(arguments)
    elif re.fullmatch(r"(\S*/)?python[\d.]*", program) and arguments[:1] == ["-m"]:
        _check_module(*arguments[1:])
    elif "/" in program:
        assert (ROOT / program).exists(), f"no {program}"
    else:
        assert program in _KNOWN, f"{program} is not a program that the documentation may call"
        for argument in arguments if program in ("pytest", "pip") else ():
            is_file = argument.startswith(("python_tests/", "requirements/"))
            assert not is_file or list(ROOT.glob(argument)), f"no {argument}"


def _check_make(arguments: list[str]) -> None:
    makefile = read("Makefile")
    for argument in arguments:
        name, is_variable, _ = argument.partition("=")
        pattern = rf"\$\({name}[:)]" if is_variable else rf"^{re.escape(name)}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile has no {argument}"


def _check_module(module: str, *arguments: str) -> None:
    assert importlib.util.find_spec(module) is not None, f"no module {module}"
    if module != "lowrank_kernels" or arguments[:1] == ("COMMAND",):
        return
    from lowrank_kernels import cli

    try:
        cli.parser().parse_args(arguments)
    except SystemExit as error:
        assert error.code in (0, None), f"lowrank_kernels does not take {shlex.join(arguments)}"
    except argparse.ArgumentError as error:
        raise AssertionError(str(error)) from None
