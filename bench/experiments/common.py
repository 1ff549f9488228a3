"""What the experiments on film reviews share: their arguments, and what a result says of its machine."""

from __future__ import annotations

import argparse
import pathlib

import torch

from lowrank_kernels.benchmark import machine


def parser_of(name: str, description: str) -> argparse.ArgumentParser:
    """Of ``python -m bench.experiments.<name>``, with ``--out`` and ``--threads``."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.experiments.{name}", description=description
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("build/rlhf"),
        help="where reviews and adapters are",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    return parser


def begin(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments, once threads and precision are set."""
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("medium")
    return args


def on() -> dict:
    """The CPU and the versions."""
    return {"cpu": machine.cpu(), "versions": machine.versions()}
