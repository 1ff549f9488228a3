"""``bench``: hands over to the benchmark suite, beside the package in a source checkout."""

from __future__ import annotations

import pathlib
import subprocess
import sys

from . import UserError


def run(arguments: list[str]) -> int:
    """``python -m bench`` with the same arguments; raises UserError where there is no checkout."""
    root = pathlib.Path(__file__).resolve().parents[2]
    if not (root / "bench" / "__main__.py").is_file():
        raise UserError(
            "the benchmark suite is not part of the installed package; run it in a source checkout"
        )
    return subprocess.run([sys.executable, "-m", "bench", *arguments], cwd=root).returncode
