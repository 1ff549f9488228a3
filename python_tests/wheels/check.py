"""Verifies the wheels of dist/ (``make wheel-check``): what is inside, and whether they work in clean environments.

Every wheel is looked into (see contents.py). Then each Python and torch make a virtual environment outside the
sources, with these and the wheel and what they require, where smoke.py runs. One environment exists at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from . import contents
from .contents import PACKAGE, ROOT, Wheel, WheelError, last_line, reason, require

SMOKE = pathlib.Path(__file__).with_name("smoke.py")
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")


class Row(NamedTuple):
    """A line of the table."""

    wheel: str
    python: str
    torch: str
    result: str
    seconds: float
    passed: bool


class Table:
    """Runs checks and remembers how each ended."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def run(self, wheel: str, python: str, torch: str, call: Callable[..., str], *args) -> None:
        print(f"[wheel-check] {wheel}, {python}, torch {torch}", flush=True)
        start = time.monotonic()
        try:
            result, passed = call(*args), True
        except WheelError as error:
            result, passed = f"FAILED: {error}", False
        self.add(wheel, python, torch, result, time.monotonic() - start, passed)

    def add(self, *row: object) -> None:
        self.rows.append(Row(*row))

    def text(self) -> str:
        cells = [("wheel", "Python", "torch", "seconds", "result")]
        cells += [(r.wheel, r.python, r.torch, f"{r.seconds:.0f}", r.result) for r in self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(4)]
        lines = ("  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[4]]) for row in cells)
        return "\n".join(lines)


@contextlib.contextmanager
def environment(python: str) -> Iterator[Callable[..., str]]:
    """An empty virtual environment outside the sources; calls run its Python there, with these arguments."""
    with tempfile.TemporaryDirectory(prefix="wheel-check-") as folder:
        # Nothing of this environment, the user's or ours, must reach that one.
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LOWRANK"))}
        variables["TMPDIR"] = folder  # torch.compile keeps what it compiled there

        def run(*command: str) -> str:
            done = subprocess.run(
                command,
                cwd=folder,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if done.returncode:
                print(done.stdout)
                raise WheelError(reason(done.stdout))
            return done.stdout

        run(python, "-m", "venv", "env")
        shutil.copy(SMOKE, folder)
        yield functools.partial(run, f"{folder}/env/bin/python", "-I")


def python_tag(python: str) -> str:
    """cp311 of a command. WheelError: it is none."""
    program = "import sys; print('cp%d%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True)
    except FileNotFoundError:
        raise WheelError(f"there is no {python}") from None
    require(done.returncode == 0, f"{python}: {reason(done.stderr)}")
    return done.stdout.strip()


def smoke(table: Table, wheels: list[Wheel], python: str, torch: str) -> None:
    """One environment for all wheels of one Python, one after another."""
    tag = pathlib.Path(python).name
    try:
        tag = python_tag(python)
        fitting = [wheel for wheel in wheels if wheel.python == tag]
        require(fitting, f"no wheel for {tag} in dist: make wheel PYTHON={python}")
        with environment(python) as run:
            for wheel in fitting:
                table.run(wheel.kind, tag, torch, install_and_run, run, wheel, torch)
    except WheelError as error:  # there is no environment
        table.add("-", tag, torch, f"FAILED: {error}", 0.0, False)


def install_and_run(run: Callable[..., str], wheel: Wheel, torch: str) -> str:
    run(*PIP, "uninstall", "--yes", PACKAGE)  # another wheel
    run(*PIP, "install", f"torch=={torch}", str(wheel.path))
    run("-m", "pip", "check")
    return last_line(run("smoke.py"))


def build_from_sdist(python: str, dist: pathlib.Path) -> str:
    """pip builds the sdist, in an environment of its own, into a wheel with the same files."""
    sdist = dist / f"{PACKAGE}-{contents.project_version()}.tar.gz"
    require(sdist.exists(), f"there is no {sdist.name}: make wheel")
    with environment(python) as run, tempfile.TemporaryDirectory() as folder:
        run(*PIP, "wheel", "--no-deps", "--wheel-dir", folder, str(sdist))
        (path,) = pathlib.Path(folder).glob("*.whl")
        with zipfile.ZipFile(path) as archive:
            contents.check_files(Wheel(path), archive)
    return f"builds {path.name}"


def pinned_torch() -> str:
    return re.search(r"^torch==(.+)$", (ROOT / "requirements/base.txt").read_text(), re.M)[1]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="wheel-check", description=__doc__)
    add = parser.add_argument
    add("--python", action="append", help="a command, once for each; default: this one")
    add("--torch", action="append", help="a version, once for each; default: the pinned one")
    add("--dist", type=pathlib.Path, default=ROOT / "dist", help="the folder; default: dist")
    add("--no-smoke", action="store_true", help="only look into the wheels: install nothing")
    add("--sdist", action="store_true", help="pip also builds the sdist, in isolation (minutes)")
    chosen = parser.parse_args(argv)
    chosen.python = chosen.python or [sys.executable]
    chosen.torch = chosen.torch or [pinned_torch()]
    chosen.dist = chosen.dist.resolve()
    return chosen


def main(argv: list[str] | None = None) -> int:
    """0 if all is well; 1, and the first reason on stderr, if not."""
    chosen, table, wheels = arguments(argv), Table(), []
    for path in sorted(chosen.dist.glob(f"{PACKAGE}-{contents.project_version()}-*.whl")):
        try:
            wheels.append(Wheel(path))
        except WheelError as error:
            table.add(path.name, "-", "-", f"FAILED: {error}", 0.0, False)
        else:
            table.run(wheels[-1].kind, wheels[-1].python, "-", contents.check, wheels[-1])
    if not table.rows:
        print(
            f"wheel-check: no wheel of {contents.project_version()} in {chosen.dist}: make wheel",
            file=sys.stderr,
        )
        return 1
    if chosen.sdist:
        name = pathlib.Path(chosen.python[0]).name
        table.run("sdist", name, "-", build_from_sdist, chosen.python[0], chosen.dist)
    for python in () if chosen.no_smoke else chosen.python:
        for torch in chosen.torch:
            smoke(table, wheels, python, torch)
    print(table.text())
    failed = [row for row in table.rows if not row.passed]
    if failed:
        first = failed[0]
        reason = f"{first.wheel}, {first.python}, torch {first.torch}: {first.result}"
        print(f"wheel-check: {len(failed)} of {len(table.rows)} failed: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
