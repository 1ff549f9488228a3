"""Build, test, check and measure on a machine with a GPU, in one command and under nine minutes.

    python -m bench.gpu [--only build,test,sanitize,bench] [--quick]

It uses the Python that runs it, installs nothing and needs no network. Wheels in the folder .whl of
the checkout, if there is one, are unpacked into build/site for this run. All output also goes to
gpu.log in the folder $OUT, or in build; with $OUT set, the results are copied there. The summary
comes last. Exit code 1 if a step failed; later steps run all the same where they make sense.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from . import report, summary

ROOT = pathlib.Path(__file__).parent.parent
TOTAL_SECONDS = 530
GRACE_SECONDS = 5  # between asking a command to stop and killing it
TESTS = (
    "dequantize_4bit", "quantize_4bit", "double_quantize", "linear_4bit", "linear_4bit_dx",
    "lora_linear_4bit", "lora_linear_4bit_backward", "lora_linear", "lora_linear_backward",
    "multi_lora_", "multi_lora_backward", "multi_lora_linear_4bit",
    "multi_lora_linear_4bit_backward", "multi_lora", "bank",
    "functional", "nn_lora", "cuda",
)  # fmt: skip
FACTS = """
import json, sys, torch
if not torch.cuda.is_available(): sys.exit("torch finds no CUDA device")
p = torch.cuda.get_device_properties(0)
print(json.dumps({"name": p.name, "capability": [p.major, p.minor], "torch": torch.__version__,
    "cuda": torch.version.cuda, "python": sys.version.split()[0], "sms": p.multi_processor_count,
    "l2_bytes": p.L2_cache_size, "memory_bytes": p.total_memory}))
"""


class Command(NamedTuple):
    """``required``: the step fails with it; ``anyway``: it runs even if one before it failed."""

    argv: list[str]
    seconds: float
    env: dict[str, str] = {}
    required: bool = True
    anyway: bool = False


class Step(NamedTuple):
    """``seconds`` it may take, ``least`` that earlier steps leave it; ``commands`` of the seconds.

    ``commands`` may return a text instead, which says why there is nothing to run.
    """

    name: str
    seconds: float
    least: float
    commands: Callable[[float], list[Command] | str]
    needs: str | None = None


class Result(NamedTuple):
    status: str  # "ok", "failed", "timed out", "skipped"
    seconds: float
    output: str


# -- running commands ------------------------------------------------------------------------------


class Log:
    """What is written goes to the terminal and to a file, at once."""

    def __init__(self, path: pathlib.Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._file = path, path.open("w")

    def write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        self._file.write(text)
        self._file.flush()

    def line(self, text: str = "") -> None:
        self.write(text + "\n")


def execute(command: Command, seconds: float, log: Log) -> Result:
    """Runs one command, its output to ``log``; all that it started is killed after ``seconds``."""
    start, lines = time.monotonic(), []
    try:
        process = subprocess.Popen(
            command.argv,
            cwd=ROOT,
            env=os.environ | command.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        log.line(str(error))
        return Result("failed", 0.0, str(error))

    def copy() -> None:
        for line in process.stdout:
            lines.append(line)
            log.write(line)

    reader = threading.Thread(target=copy, daemon=True)
    reader.start()
    status = "timed out"
    try:
        status = "failed" if process.wait(max(0.1, seconds)) else "ok"
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGINT)  # at which pytest still says which tests failed
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()
    reader.join(timeout=GRACE_SECONDS)
    return Result(status, time.monotonic() - start, "".join(lines))


def _signal(process: subprocess.Popen, number: int) -> None:
    """To the whole group of the process, which is a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def allowed(step: Step, later: list[Step], left: float) -> float:
    """The seconds that ``step`` gets when ``left`` remain for it and the ``later`` ones."""
    return max(step.least, min(step.seconds, left - sum(other.least for other in later)))


def run_step(step: Step, seconds: float, log: Log) -> Result:
    """Its commands in turn, after a failed one only those that run anyway."""
    commands = step.commands(seconds)
    if isinstance(commands, str):
        log.line(commands)
        return Result("skipped", 0.0, commands)
    start, status, output = time.monotonic(), "ok", ""
    for command in commands:
        if status != "ok" and not command.anyway:
            continue
        left = min(seconds - (time.monotonic() - start), command.seconds)
        words = " ".join(" ".join(command.argv).split())
        log.line(f"$ {words[:160]}   [at most {left:.0f} s]")
        result = execute(command, left, log)
        output += result.output
        if result.status != "ok" and command.required:
            status = result.status
            log.line(f"[{status} after {result.seconds:.0f} s]")
    return Result(status, time.monotonic() - start, output)


def run_steps(steps: list[Step], log: Log, total: float, results: dict[str, Result]) -> None:
    """All steps within ``total`` seconds, into ``results``; one whose need failed is skipped."""
    start = time.monotonic()
    for index, step in enumerate(steps):
        needed = results.get(step.needs or "")
        if needed and needed.status != "ok":
            results[step.name] = Result("skipped", 0.0, f"{step.needs}: {needed.status}")
            continue
        left = total - (time.monotonic() - start)
        seconds = allowed(step, steps[index + 1 :], left)
        log.line(f"\n==== {step.name} (at most {seconds:.0f} s)")
        results[step.name] = result = run_step(step, seconds, log)
        log.line(f"==== {step.name}: {result.status}, {result.seconds:.0f} s")


# -- the steps -------------------------------------------------------------------------------------


def architecture(capability: list[int]) -> str:
    """What TORCH_CUDA_ARCH_LIST has to say for this device alone."""
    major, minor = capability
    return "9.0a" if (major, minor) == (9, 0) else f"{major}.{minor}"


def build_commands(seconds: float, facts: dict) -> list[Command]:
    env = {
        "LOWRANK_BUILD_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": architecture(facts["capability"]),
        "MAX_JOBS": str(len(os.sched_getaffinity(0))),
    }
    return [Command([sys.executable, "setup.py", "build_ext", "--inplace"], seconds, env)]


def test_commands(seconds: float) -> list[Command]:
    files = [f"python_tests/test_{name}.py" for name in TESTS]
    argv = [sys.executable, "-m", "pytest", "-q", "--maxfail=30", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        argv += ["-n", "4"]
    argv += [file for file in files if (ROOT / file).exists()]
    return [Command(argv, seconds, {"LOWRANK_TEST_DEVICE": "cuda"})]


def sanitize_commands(seconds: float) -> list[Command] | str:
    tool = find("compute-sanitizer")
    if tool is None:
        return "compute-sanitizer was not found"
    # Without torch's cache of memory, which would hide a step over a tensor's end.
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Command(
            [tool, "--tool", name, "--error-exitcode", "9", "--report-api-errors", "no"]
            + ["--print-limit", "10", sys.executable, "-m", "bench.smoke"],
            share * seconds,
            env,
            anyway=True,
        )
        for name, share in (("memcheck", 0.55), ("racecheck", 1.0))
    ]


def bench_commands(seconds: float, quick: bool, note: str | None) -> list[Command]:
    """Measures, and stops by itself in time for its tables; then the documents, failures and all."""
    writing = 0.0 if quick else 0.1 * seconds
    argv = [sys.executable, "-m", "bench", "--device", "cuda"]
    argv += ["--budget", f"{0.85 * (seconds - writing):.0f}"]
    argv += ["--quick"] if quick else []
    argv += ["--note", note] if note else []
    commands = [Command(argv, seconds - writing)]
    if not quick:
        commands.append(Command([sys.executable, "-m", "bench.report"], writing, anyway=True))
    return commands


def find(program: str) -> str | None:
    """A program of the CUDA toolkit."""
    return shutil.which(program) or shutil.which(program, path="/usr/local/cuda/bin")


def facts_commands(seconds: float) -> list[Command]:
    return [
        Command(["nvidia-smi"], 20, required=False),
        Command([find("nvcc") or "nvcc", "--version"], 20, required=False),
        Command([sys.executable, "-c", FACTS], seconds),
    ]


def wheel_commands(seconds: float) -> list[Command]:
    wheels = sorted(str(path) for path in (ROOT / ".whl").glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    return [
        Command([*pip, "--upgrade", "--target", str(ROOT / "build" / "site"), *wheels], seconds)
    ]


# -- the end: results and summary ------------------------------------------------------------------


def summary_line(output: str) -> str | None:
    """pytest's last line: how many passed and failed."""
    lines = re.findall(r"^.*\d+ (?:passed|failed|errors?)\b.*$", output, re.MULTILINE)
    return lines[-1].strip("= ") if lines else None


def problems(results: dict[str, Result], limit: int = 12) -> list[str]:
    """The lines that name what went wrong, the first ones of each step; tests without parameters."""
    patterns = {
        "build": r"(?:error|fatal|FAILED).*",
        "test": r"^(?:FAILED|ERROR) [^\[\s]*",
        "sanitize": r"ERROR SUMMARY.*|Invalid .*|.*[Hh]azard.*",
        "bench": r"^bench.*: .*|^\w*(?:Error|Wrong|Exception)\b.*",
    }
    found = []
    for name, pattern in patterns.items():
        if name in results and results[name].status not in ("ok", "skipped"):
            lines = re.findall(pattern, results[name].output, re.MULTILINE)
            counted = collections.Counter(line[:150] for line in lines).items()
            found += [f"{name}: {line}{f' (x{n})' * (n > 1)}" for line, n in counted][:limit]
    return found


def result_file(name: str, quick: bool) -> pathlib.Path:
    """Where the benchmark of the GPU called ``name`` writes."""
    folder = ROOT / "build" / "bench" if quick else ROOT / "bench" / "results"
    return folder / f"{report.machine_name({'gpu': {'name': name}})}.json"


def gather_compiler_logs(target: pathlib.Path) -> None:
    """What ptxas said of every kernel, in one file."""
    logs = sorted((ROOT / "build").glob("temp*/csrc/cuda/**/*.log"))
    if logs:
        target.write_text("".join(f"==== {log.name}\n{log.read_text()}\n" for log in logs))


def finish(results: dict[str, Result], document: dict | None, log: Log) -> int:
    """Prints the steps, what went wrong and the summary; the exit code."""
    log.line("\n==== steps")
    for name, result in results.items():
        more = summary_line(result.output) if name == "test" else None
        log.line(f"  {name:9} {result.status:9} {result.seconds:4.0f} s  {more or ''}".rstrip())
    for line in problems(results):
        log.line(line)
    if document is not None:
        log.line("\n==== summary")
        log.line(summary.text(document))
    return int(any(result.status in ("failed", "timed out") for result in results.values()))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    names = ("build", "test", "sanitize", "bench")

    def chosen(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(names):
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(names)}, got {unknown}")
        return [name for name in names if name in text.split(",")]

    first = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=first)
    parser.add_argument("--only", type=chosen, default=list(names), metavar="STEP,...")
    parser.add_argument("--quick", action="store_true", help="one shape, fewer rounds")
    return parser.parse_args(argv)


def note_of(results: dict[str, Result]) -> str | None:
    """What the results of the benchmark have to say of the tests before it."""
    test = results.get("test")
    if test is None or test.status == "ok":
        return None
    return f"The tests before this run did not pass: {summary_line(test.output) or test.status}."


def known_steps(facts: dict, quick: bool, results: dict[str, Result]) -> list[Step]:
    """``results`` are those of the steps that ran before, once a step makes its commands."""

    def measure(seconds: float) -> list[Command]:
        return bench_commands(seconds, quick, note_of(results))

    return [
        Step("build", 180, 60, functools.partial(build_commands, facts=facts)),
        Step("test", 180, 60, test_commands, needs="build"),
        Step("sanitize", 60, 20, sanitize_commands, needs="build"),
        Step("bench", 240, 120, measure, needs="build"),
    ]


def main(argv: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its command is killed too
    args, start = parse(argv), time.monotonic()
    out = os.environ.get("OUT")
    target = pathlib.Path(out) if out else ROOT / "build"
    log = Log(target / "gpu.log")
    prepare = [Step("facts", 60, 20, facts_commands)]
    if any((ROOT / ".whl").glob("*.whl")):
        prepare.append(Step("wheels", 60, 10, wheel_commands))
    path = [str(ROOT / "build" / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ |= {"PYTHONPATH": ":".join(filter(None, path)), "PYTHONUNBUFFERED": "1"}
    results: dict[str, Result] = {}
    run_steps(prepare, log, TOTAL_SECONDS, results)
    if results["facts"].status != "ok":
        return finish(results, None, log)
    facts = json.loads(re.findall(r"^\{.*\}$", results["facts"].output, re.MULTILINE)[-1])
    steps = [step for step in known_steps(facts, args.quick, results) if step.name in args.only]
    started = time.time()
    run_steps(steps, log, TOTAL_SECONDS - (time.monotonic() - start), results)
    written = result_file(facts["name"], args.quick)
    fresh = written.exists() and written.stat().st_mtime >= started
    if out:
        gather_compiler_logs(target / "ptxas.log")
        if fresh:
            docs, picture = ROOT / "docs", f"benchmarks/{written.stem}-time.png"
            made = (
                () if args.quick else (docs / picture, docs / "performance.md", ROOT / "README.md")
            )
            for file in (written, *made):
                if file.exists():
                    shutil.copy(file, target)
    return finish(results, json.loads(written.read_text()) if fresh else None, log)


if __name__ == "__main__":
    sys.exit(main())
