"""The command line: ``python -m lowrank_kernels doctor | demo | quantize | bench``. docs/cli.md describes it."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from .arguments import parser


class UserError(Exception):
    """Something the user can put right; shown as one line, exit code 1."""


def run(arguments: argparse.Namespace) -> int:
    """Runs the chosen command; its exit code."""
    return importlib.import_module(f".{arguments.command}", __name__).run(arguments)


def main(argv: list[str] | None = None) -> None:
    """Ends the process with 0, or 1 for a problem, 2 for wrong arguments, 130 for Ctrl-C.

    What the terminal's encoding lacks is printed as "?".
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    arguments = parser().parse_args(argv)
    try:
        code = run(arguments)
        sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        sys.exit(f"lowrank_kernels {arguments.command}: {error}")
    except KeyboardInterrupt:
        hint = "; --resume goes on" if arguments.command == "quantize" else ""
        print(f"interrupted{hint}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # "| head": nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a shell sees a program that SIGPIPE ended
