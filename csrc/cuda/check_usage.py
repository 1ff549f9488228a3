#!/usr/bin/env python3
"""Registers, shared memory and spills of each CUDA kernel, from the logs of `ptxas -v`.

    python csrc/cuda/check_usage.py build/cuda/csrc/cuda/launch/*.o.log

One line per kernel and architecture. Exit code 1 if a kernel spills registers or has a stack frame, that
is an array indexed at run time: both are accesses to local memory that nobody wrote. Known ones are in
ALLOWED.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

# Pattern of the demangled name -> why its stack frame or spills are right.
ALLOWED: dict[str, str] = {}


class Usage(NamedTuple):
    """One kernel on one architecture; sizes in bytes."""

    kernel: str
    architecture: str
    registers: int
    shared: int  # static; what a launch asks for is not known here
    stack: int
    spills: int

    @property
    def allowed(self) -> str | None:
        reasons = [why for pattern, why in ALLOWED.items() if re.search(pattern, self.kernel)]
        return reasons[0] if reasons else None


def read(log: str) -> list[Usage]:
    """The kernels of one log. ptxas tells of a kernel in a few lines, which belong together."""
    found = []
    for part in log.split("Compiling entry function '")[1:]:
        name, architecture = re.match(r"([^']+)' for '([^']+)'", part).groups()
        # A function called by the kernel has properties of its own, after "Function properties for".
        sizes = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        registers = re.search(r"Used (\d+) registers", part)
        if not sizes or registers is None:
            raise ValueError(f"no usage of {name} for {architecture}: is this ptxas -v?")
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(
            Usage(
                name,
                architecture,
                int(registers[1]),
                int(shared[1]) if shared else 0,
                sum(int(stack) for stack, _, _ in sizes),
                sum(int(stores) + int(loads) for _, stores, loads in sizes),
            )
        )
    return found


def demangle(names: list[str]) -> list[str]:
    command = ["c++filt", "--no-params"]  # template arguments tell kernels apart
    done = subprocess.run(
        command, input="\n".join(names), capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def main(paths: list[str]) -> int:
    usages = [usage for path in paths for usage in read(Path(path).read_text())]
    if not usages:
        print("no kernels in these logs", file=sys.stderr)
        return 1
    names = demangle([usage.kernel for usage in usages])
    usages = sorted(usage._replace(kernel=name) for usage, name in zip(usages, names))
    bad = 0
    for usage in usages:
        line = f"{usage.registers:3} registers {usage.shared:6} B shared"
        line += f" {usage.stack:4} B stack {usage.spills:4} B spills"
        if usage.stack or usage.spills:
            line += f"  ({usage.allowed})" if usage.allowed else "  <-- SPILLS"
            bad += usage.allowed is None
        print(f"{usage.architecture:8} {line}  {usage.kernel}")
    kernels = len({usage.kernel for usage in usages})
    print(
        f"{kernels} kernels, {len(usages)} with architectures, {bad} with spills or a stack frame"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
