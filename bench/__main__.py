"""Measures, prints tables, writes JSON; ``python -m bench.report`` then writes the documents."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time

import pytest
import torch
from tqdm import tqdm

import lowrank_kernels as lk
from lowrank_kernels.benchmark import timing
from lowrank_kernels.cli import files, machine

from . import cases, harness, memory, report

BENCH = pathlib.Path(__file__).parent
OPS = ("linear_4bit", "linear_4bit_dx", "lora_linear_4bit", "multi_lora", "quantize", "growth")


class Progress:
    """A pytest plugin: a progress bar in place of pytest's dots, and every failure in full.

    Where there is no terminal, a line as each provider of a case begins: if it hangs, the last one.
    """

    def __init__(self):
        self.stream = os.fdopen(os.dup(sys.stderr.fileno()), "w")  # pytest captures the other
        self.bar: tqdm | None = None
        self.failures: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.bar = tqdm(total=len(session.items), unit="turn", file=self.stream, disable=None)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.bar.disable and nodeid.endswith("-0]"):
            print(nodeid.partition("[")[2].removesuffix("-0]"), file=self.stream, flush=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failures.append(f"{report.nodeid}\n{report.longreprtext}")
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            self.bar.set_postfix_str(report.nodeid.partition("[")[2].rstrip("]"), refresh=False)
            self.bar.update()

    def pytest_unconfigure(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.stream.close()

    def pytest_report_teststatus(self, report: pytest.TestReport):
        return report.outcome, "", ""


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _shape(text: str) -> tuple[int, int]:
    N, x, K = text.partition("x")
    if not (x and N.isdecimal() and K.isdecimal() and int(N) and int(K)):
        raise argparse.ArgumentTypeError(f"expected NxK, such as 4096x4096, got {text}")
    return int(N), int(K)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what to measure")
    parser.add_argument("--quick", action="store_true", help="one shape, fewer rounds, < 4 minutes")
    parser.add_argument("--op", choices=OPS, action="append", help="only this one (repeatable)")
    parser.add_argument(
        "-k", default="", metavar="EXPR", help="only cases that match, as in pytest"
    )
    parser.add_argument(
        "--shape", type=_shape, action="append", metavar="NxK", help="other shapes (repeatable)"
    )
    parser.add_argument("--tokens", type=_positive, action="append", metavar="M", help="other M")
    parser.add_argument(
        "--seconds", type=float, help="timed per case and provider (default: 0.5; on a GPU 0.08)"
    )
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="begin no measurement after so long"
    )
    parser.add_argument("--note", help="a remark on this run, kept with its results")
    parser.add_argument(
        "--threads", type=_positive, help="threads for every provider (default: torch's)"
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        metavar="FILE",
        help="JSON to write (default: in bench/results for a full run, else in build/bench)",
    )
    return parser.parse_args(argv)


def run_pytest(args: argparse.Namespace, run: harness.Harness) -> tuple[dict, list[str]]:
    """Runs the suite in this process: the result document, and what failed."""
    progress = Progress()
    ops = [op for op in args.op or OPS if op != "growth" or cases.GROWTH_SHAPES]
    files = [BENCH / f"bench_{op}.py" for op in ops]
    with tempfile.TemporaryDirectory() as folder:
        raw = pathlib.Path(folder, "raw.json")
        options = ["-c", "/dev/null", f"--rootdir={BENCH.parent}", "-o", "python_files=bench_*.py"]
        options += ["-o", "python_functions=bench_*", "-p", "no:cacheprovider", "-qq"]
        options += ["--no-header", "--no-summary", "--benchmark-quiet", "--benchmark-disable-gc"]
        options += [f"--benchmark-json={raw}", "-W", "ignore"]
        if args.k:
            options += ["-k", f"bench_limit or ({args.k})"]
        paths = [str(path) for path in (BENCH / "bench_limits.py", *files)]
        # The harness is a plugin so that conftest.py finds it.
        config_plugins = [progress, _Named(run)]
        code = pytest.main([*options, *paths], plugins=config_plugins)
        if code not in (0, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
            sys.exit(
                "\n".join([*progress.failures, f"bench: failed (pytest exit code {int(code)})"])
            )
        text = raw.read_text() if raw.exists() else ""  # not written by a run on a GPU
    return harness.collect(json.loads(text or '{"benchmarks": []}'), run), progress.failures


class _Named:
    """Registers the harness under the name conftest.py asks for."""

    def __init__(self, run: harness.Harness):
        self.run = run

    def pytest_configure(self, config: pytest.Config) -> None:
        config.pluginmanager.register(self.run, "lowrank_bench")


def _check_device(device: str) -> None:
    """Ends the program where there is nothing to measure."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench: torch finds no CUDA device")
    if lk.backends.active() not in lk.backends.report()["available"]:
        sys.exit(f"bench: the native kernels are missing ({lk.backends.report()['build']})")


def _settings(args: argparse.Namespace) -> harness.Settings:
    settings = harness.Settings(quick=args.quick)
    if args.device == "cuda":
        settings.seconds = 0.08
    if args.quick:
        settings.passes, settings.seconds = 3, 0.4 * settings.seconds
    settings.seconds = args.seconds or settings.seconds
    if args.budget:
        settings.deadline = time.monotonic() + args.budget
    return settings


def _output(args: argparse.Namespace, document: dict) -> pathlib.Path:
    """Only a full run replaces the results that the documents are made of."""
    chosen = (args.quick, args.op, args.k, args.shape, args.tokens, args.seconds)
    folder = BENCH.parent / "build" / "bench" if any(chosen) else BENCH / "results"
    return args.output or folder / f"{report.machine_name(document)}.json"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    _check_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    # The modules of the suite read these when pytest imports them, which is later.
    cases.choose(args.device, args.shape, args.tokens)
    start = time.perf_counter()
    load = machine.load_average()
    if load is not None and load > machine.BUSY and args.device == "cpu":
        print(f"bench: load average {load:.1f}: other programs disturb the result", file=sys.stderr)
    more = {"load_average_before": load} | ({"note": args.note} if args.note else {})
    if args.device == "cpu":
        more["freed_memory_kept"] = timing.keep_freed_memory()
    run = harness.Harness(_settings(args))
    output = _output(args, harness.header(run))
    output.parent.mkdir(parents=True, exist_ok=True)

    def save_part() -> None:
        document = harness.collect({"benchmarks": []}, run) | more | {"complete": False}
        files.write_json(document, output)

    run.on_case = save_part
    document, failures = run_pytest(args, run)
    document |= more
    if args.device == "cpu" and not (args.op or args.k):
        print("memory", file=sys.stderr)
        document["memory"] = memory.measure(*cases.SHAPES[-1], cases.TOKENS, document["threads"])
    files.write_json(document, output)
    print(report.text(document))
    print(f"{time.perf_counter() - start:.0f} s; wrote {output}")
    if output.parent == BENCH / "results":
        print("next: python -m bench.report writes docs/performance.md and the table of README.md")
    if failures:
        sys.exit("\n\n".join([*failures[:3], f"bench: {len(failures)} failures"]))


if __name__ == "__main__":
    main()
