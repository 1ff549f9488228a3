"""Runs functions in two or more processes that form a gloo group, once for a whole test module.

A worker module has functions ``check_<name>(rank, size)``; each runs on all processes, one after another in one
group, and its outcome is one test in the parent::

    results = processes.results("tensor_parallel_workers", size=2)   # name -> None or the traceback
"""

from __future__ import annotations

import datetime
import importlib
import inspect
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import traceback

TIMEOUT = 100  # seconds, for all checks of a module; a quiet machine needs 10


def names(module: str) -> list[str]:
    """The checks of a worker module, in its order, found without importing it."""
    text = pathlib.Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    lines = (line for line in text.splitlines() if line.startswith("def check_"))
    return [line.removeprefix("def ").partition("(")[0] for line in lines]


def results(module: str, size: int) -> dict[str, str | None]:
    """Of each check: None, or what went wrong in which process."""
    here = pathlib.Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, [str(here), *sys.path])),
        }
        command = [sys.executable, __file__, module, str(size), folder]
        workers = []
        for rank in range(size):
            with open(f"{folder}/{rank}.log", "w") as log:
                workers.append(
                    subprocess.Popen(
                        [*command, str(rank)],
                        env=environment,
                        cwd=folder,  # where checks may write
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            for worker in workers:
                worker.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            pass
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        return {name: _outcome(name, pathlib.Path(folder), size) for name in names(module)}


def _outcome(name: str, folder: pathlib.Path, size: int) -> str | None:
    failures = []
    for rank in range(size):
        file = folder / f"{rank}.{name}"
        outcome = (
            pickle.loads(file.read_bytes())
            if file.exists()
            else "did not finish, or an earlier check failed"
        )
        if outcome is not None:
            log = (folder / f"{rank}.log").read_text(errors="replace")[-3000:]
            failures.append(f"process {rank}: {outcome}\nits output: {log}")
    return "\n".join(failures) or None


def _main(module: str, size: str, folder: str, rank: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=int(rank),
        world_size=int(size),
        timeout=datetime.timedelta(seconds=60),
    )
    checks = dict(inspect.getmembers(importlib.import_module(module), inspect.isfunction))
    for name in names(module):
        torch.manual_seed(0)
        try:
            outcome = checks[name](int(rank), int(size))
        except Exception:
            outcome = traceback.format_exc()
        temporary = pathlib.Path(folder, f"{rank}.tmp")
        temporary.write_bytes(pickle.dumps(outcome))
        temporary.rename(pathlib.Path(folder, f"{rank}.{name}"))
        if outcome is not None:  # the others may wait for this process in a collective
            raise SystemExit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
