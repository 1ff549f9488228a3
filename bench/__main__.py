"""Measures, prints tables, writes JSON; ``python -m bench.report`` then writes the documents."""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
import time

import torch

import lowrank_kernels as lk
from lowrank_kernels import files
from lowrank_kernels.benchmark import harness, machine, timing
from lowrank_kernels.cli.arguments import positive, shape

from . import limits, peer_ggml, report, suite

BENCH = pathlib.Path(__file__).parent


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="what to measure")
    add("--quick", action="store_true", help="one shape, no models, fewer rounds, < 4 minutes")
    add("--op", choices=tuple(suite.OPS), action="append", help="only this one (repeatable)")
    add("-k", default="", metavar="TEXT", help="only cases with this in their name, such as M16")
    add("--shape", type=shape, action="append", metavar="NxK", help="other shapes (repeatable)")
    add("--tokens", type=positive, action="append", metavar="M", help="other M (repeatable)")
    add("--seconds", type=float, help="timed per case and provider (default: 0.5; on a GPU 0.08)")
    add("--budget", type=float, metavar="SECONDS", help="begin no measurement after so long")
    add("--model", action="append", help="of the whole models, these (repeatable)")
    add("--into", type=pathlib.Path, metavar="FILE", help="add to these results of this machine")
    add("--note", help="a remark on this run, kept with its results")
    add("--threads", type=positive, help="threads for every provider (default: torch's)")
    add(
        "--output",
        type=pathlib.Path,
        metavar="FILE",
        help="JSON to write (default: in bench/results for a full run, else in build/bench)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, start = parse(argv), time.monotonic()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench: torch finds no CUDA device")
    if lk.backends.active() not in lk.backends.report()["available"]:
        sys.exit(f"bench: the native kernels are missing ({lk.backends.report()['build']})")
    if args.threads:
        torch.set_num_threads(args.threads)
    document = _header(args)
    output = _output(args, document)
    output.parent.mkdir(parents=True, exist_ok=True)
    before = _before(args, document)
    _measure(args, document, output, start + args.budget if args.budget else float("inf"), before)
    del document["complete"]
    document["cases"] = _together(document, before)
    files.write_json(document, output)
    print(report.text(document))
    print(f"{time.monotonic() - start:.0f} s; wrote {output}")
    if output.parent == BENCH / "results":
        print("next: python -m bench.report writes docs/performance and the tables of README.md")
    if failed := harness.failures(document):
        sys.exit("\n".join([*failed[:3], f"bench: {len(failed)} failures"]))


def _before(args: argparse.Namespace, document: dict) -> list[dict]:
    """The cases of the results that this run adds to; its limits begin with theirs."""
    if not args.into or not args.into.exists():
        return []
    found = harness.read(args.into)
    for what, of in (("machine", report.machine_name), ("versions", lambda d: d["versions"])):
        if of(found) != of(document):
            sys.exit(f"bench: --into {args.into}: {what}: {of(found)} there, {of(document)} here")
    document["limits"] |= found["limits"]
    return found["cases"]


def _header(args: argparse.Namespace) -> dict:
    load = machine.load_average()
    if load is not None and load > machine.BUSY and args.device == "cpu":
        print(f"bench: load average {load:.1f}: other programs disturb the result", file=sys.stderr)
    document = harness.header(args.device) | {"quick": args.quick, "commit": _commit()}
    document |= {"load_average_before": load} | ({"note": args.note} if args.note else {})
    if args.device == "cpu":
        document["freed_memory_kept"] = timing.keep_freed_memory()
        peers = {name: machine.version(name) for name in ("openvino", "onnxruntime")}
        document["versions"] |= peers | {"ggml": peer_ggml.version()}
    return document | {"complete": False, "limits": {}, "cases": []}


def _together(document: dict, before: list[dict]) -> list[dict]:
    """What was measured now, and of the cases before those that were not."""
    measured = {harness.key(case) for case in document["cases"]}
    return document["cases"] + [case for case in before if harness.key(case) not in measured]


def _measure(
    args: argparse.Namespace, document: dict, output: pathlib.Path, end: float, before: list[dict]
) -> None:
    """Fills ``document``; on a GPU also writes it after each case, so that results outlive a crash.

    The limits are measured in turns that are spread evenly over the run, from its start to its end.
    """
    passes = 3 if args.quick else 4
    seconds = 0.08 if args.device == "cuda" else 0.5
    seconds = args.seconds or seconds * (0.4 if args.quick else 1.0)
    sizes = suite.SIZES[args.device].chosen(args.shape, args.tokens, args.model)
    entries = suite.entries(sizes, args.op, args.k, args.quick)
    turns = limits.TURNS // 2 if args.quick else limits.TURNS
    marks = [round(turn * len(entries) / (turns - 1)) for turn in range(turns)]  # cases before them

    def take_limits() -> None:
        limits.measure(args.device, document["limits"])
        for (case, _), measured in zip(entries, document["cases"]):
            if case.op != "model":
                rates = limits.rates(document["limits"], case.dtype)
                measured["limit_ms"] = case.limit_seconds(*rates) * 1e3

    take_limits()
    for index, measured in enumerate(harness.run(entries, seconds, passes, end)):
        document["cases"].append(measured)
        if index + 1 in marks:
            take_limits()
        if args.device == "cuda":
            torch.cuda.empty_cache()  # a graph's memory is no use to the next one
            files.write_json(document | {"cases": _together(document, before)}, output)


def _output(args: argparse.Namespace, document: dict) -> pathlib.Path:
    """Only a full run replaces the results that the documents are made of."""
    chosen = (args.quick, args.op, args.k, args.shape, args.tokens, args.model, args.seconds)
    folder = BENCH.parent / "build" / "bench" if any(chosen) else BENCH / "results"
    return args.output or args.into or folder / f"{report.machine_name(document)}.json"


def _commit() -> str | None:
    """The commit of this checkout, "+" if files differ from it; None outside a repository."""
    words = ["git", "-C", str(BENCH), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    main()
