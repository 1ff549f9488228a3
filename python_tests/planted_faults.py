"""Plants faults in the sources, one at a time, and demands that the tests notice: ``make planted-faults``.

    python python_tests/planted_faults.py [--list] [--only WORD] [--shard 0/4] [--jobs N]

Each fault of planted_faults_table.py is a text that stands exactly once in a file, and what takes its place. For each
one the tree is copied to a temporary folder, the fault is put in, what it concerns is compiled (of the CPU kernels the
unit of one instruction set, or of every vector one where the table says so; those for AMX with its registers in
software, where this CPU has none), and the tests that the table names must fail there. Before that the same tests must
pass on a copy without a fault, compiled in the same way.

Needs a tree that is built: what has not changed is not compiled again. Exit status 1 if a fault survives, if its text
is not there exactly once, or if the tests fail without a fault.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

import emulated_amx
import lowrank_kernels as lk
from planted_faults_table import FAULTS, Fault

ROOT = pathlib.Path(__file__).resolve().parents[1]
COPIED = (
    "lowrank_kernels",
    "csrc",
    "python_tests",
    "setup.py",
    "pyproject.toml",
    "Makefile",
    "docs",
)
EMULATOR = "build/emulator/liblowrank_cuda_emulated.so"
EMULATED_AMX = "build/emulated-amx/liblowrank_cpu.so"
TIMEOUT = 600  # seconds, for a build, or the tests without a fault
ENDLESS = 200  # seconds after which the tests of a fault are taken to hang; they take some
# What a fault of all CPU kernels is compiled for: the first that this CPU has, or each.
VECTOR = ("avx512", "avx2", "neon")
CAUGHT, SURVIVED = "caught", "SURVIVED"


class Problem(Exception):
    """Neither caught nor survived: the table or the tree is wrong."""


def isas(fault: Fault) -> list[str]:
    """Instruction sets to compile the fault for, those that this CPU has; [""] where there is no choice."""
    parts = pathlib.PurePath(fault.file).parts
    if parts[:2] != ("csrc", "cpu"):
        return [""]
    if parts[2] == "simd":
        wanted = [pathlib.PurePath(fault.file).stem]
    elif parts[2] == "amx":
        wanted = ["amx"]
    else:
        wanted = [isa for isa in VECTOR if isa in lk.backends.isas()]
        wanted = wanted if fault.each_isa else wanted[:1]
    return [isa for isa in wanted if isa in lk.backends.isas() or emulated(isa)]


def emulated(isa: str) -> bool:
    """Whether the kernels of this instruction set run on its emulation."""
    missing = isa == "amx" and isa not in lk.backends.isas()
    return missing and emulated_amx.why_not(ROOT / EMULATED_AMX) is None


def copy_tree(folder: pathlib.Path) -> pathlib.Path:
    """With the times of files, so that ninja and make know what is built."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    built_before = ("build/temp.*", "build/emulator", "build/emulated-amx")
    for built in (path for pattern in built_before for path in ROOT.glob(pattern)):
        shutil.copytree(built, folder / "build" / built.name)
    return folder


def run(
    command: list[str], tree: pathlib.Path, limit: float = TIMEOUT, **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=tree, env=os.environ | environment, capture_output=True, text=True,
        timeout=limit,
    )  # fmt: skip


def must(command: list[str], tree: pathlib.Path) -> str:
    done = run(command, tree)
    if done.returncode:
        raise Problem(f"{shlex.join(command)[:200]}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def build_cpu(tree: pathlib.Path, isa: str) -> None:
    """The unit of one instruction set, with little optimization, and the library."""
    import ninja

    program = shutil.which("ninja", path=ninja.BIN_DIR) or "ninja"
    (script,) = tree.glob("build/temp.*/build.ninja")
    ask = [program, "-f", str(script.relative_to(tree)), "-t"]
    commands = json.loads(must([*ask, "compdb", "compile"], tree))
    unit = f"csrc/cpu/isa/{isa}.cpp"
    (compile_unit,) = (c["command"] for c in commands if c["file"] == unit)
    must(["sh", "-c", f"{compile_unit} -O1"], tree)
    library = script.parent.relative_to(tree) / "liblowrank_cpu.so"
    link = must([*ask, "commands", str(library)], tree).strip().splitlines()[-1]
    must(["sh", "-c", link], tree)
    shutil.copy2(tree / library, tree / "lowrank_kernels")


def build(tree: pathlib.Path, file: str, isa: str) -> None:
    if emulated(isa):
        must(["make", "--no-print-directory", "emulated-amx", "JOBS=1"], tree)
    elif isa:
        build_cpu(tree, isa)
    elif file.startswith("csrc/cuda/"):
        flags = "EMULATOR_FLAGS=-O1 $(EMULATOR_COMMON)"
        must(["make", "--no-print-directory", "emulator", "JOBS=1", flags], tree)
    elif file.startswith("csrc/"):
        must([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], tree)


def run_tests(
    tree: pathlib.Path, tests: tuple[str, ...], word: str, limit: float = TIMEOUT
) -> tuple[int, str]:
    """pytest's exit status and output; of the tests only those whose names fit the expression ``word``."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += [f"python_tests/{test}" for test in tests] + (["-k", word] if word else [])
    variables = {"PYTHONPATH": str(tree), "LOWRANK_EMULATOR": str(tree / EMULATOR)}
    if emulated(word):
        variables |= emulated_amx.environment(tree / EMULATED_AMX)
    try:
        done = run(command, tree, limit, LOWRANK_BACKEND="", LOWRANK_ISA="", **variables)
    except subprocess.TimeoutExpired:  # a fault may make a loop endless, which nobody overlooks
        return -1, f"FAILED {' '.join(tests)}: no end within {limit} s"
    return done.returncode, done.stdout[-3000:] + done.stderr[-1000:]


def word_of(fault: Fault, isa: str) -> str:
    """What the names of tests must have to run the fault: test_cuda_*.py are the emulator's in any case."""
    return isa or ("emulator or cuda" if fault.file.startswith("csrc/cuda/") else "")


def plant(fault: Fault, isa: str) -> tuple[str, str]:
    """(CAUGHT or SURVIVED, by which test); Problem where neither can be said."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        tree = copy_tree(pathlib.Path(folder))
        path = tree / fault.file
        text = path.read_text(encoding="utf-8")
        if text.count(fault.old) != 1:
            raise Problem(f"{fault.file} has the text {text.count(fault.old)} times: {fault.old!r}")
        path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        build(tree, fault.file, isa)
        status, output = run_tests(tree, fault.tests, word_of(fault, isa), ENDLESS)
    if status == 0:
        return SURVIVED, ""
    if status == 1 or status < 0:  # a test failed, or the process crashed
        failed = [line for line in output.splitlines() if line.startswith(("FAILED", "SUBFAILED"))]
        return CAUGHT, failed[0].split(" - ")[0] if failed else f"the process ended with {status}"
    raise Problem(f"pytest ended with {status}:\n{output}")


def without_a_fault(work: list[tuple[Fault, str]]) -> tuple[str, str]:
    """All the tests of the faults, on a tree that has none."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        tree = copy_tree(pathlib.Path(folder))
        for isa in sorted({isa for _, isa in work if isa}):
            build(tree, "", isa)
        for word in sorted({word_of(*each) for each in work}):
            tests = {
                test: None for each in work if word_of(*each) == word for test in each[0].tests
            }
            status, output = run_tests(tree, tuple(tests), word)
            if status:
                raise Problem(f"the tests fail without a fault ({word or 'host'}):\n{output}")
    return "passes", ""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="show the table and run nothing")
    parser.add_argument(
        "--only", metavar="WORD", help="faults with this word in their file or meaning"
    )
    parser.add_argument("--shard", default="0/1", help="every n-th fault, from the i-th on: i/n")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="so many at a time")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    first, step = map(int, options.shard.split("/"))
    chosen = [f for f in FAULTS if not options.only or options.only in f"{f.file} {f.breaks}"]
    chosen = chosen[first::step]
    if options.list:
        for fault in chosen:
            print(f"{fault.file}: {fault.breaks}; {', '.join(fault.tests)}")
        return 0
    work = [(fault, isa) for fault in chosen for isa in isas(fault)]
    for fault in chosen:
        if not isas(fault):
            print(f"skipped: {fault.file}: {fault.breaks}: this CPU has only {lk.backends.isas()}")
    start, wrong = time.monotonic(), 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        jobs = {pool.submit(without_a_fault, work): "without a fault"}
        for fault, isa in work:
            what = f"{fault.file}: {fault.breaks}{f' ({isa})' if isa else ''}"
            jobs[pool.submit(plant, fault, isa)] = what
        for job in concurrent.futures.as_completed(jobs):
            try:
                result, by = job.result()
            except (Problem, subprocess.TimeoutExpired) as error:
                result, by = "PROBLEM", str(error)
            wrong += result in (SURVIVED, "PROBLEM")
            print(f"{result}: {jobs[job]}{f': {by}' if by else ''}", flush=True)
    print(f"{len(work)} planted faults, {wrong} not caught, {time.monotonic() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
