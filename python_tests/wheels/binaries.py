"""What a shared object asks of others, and which GPU architectures are in it."""

from __future__ import annotations

import pathlib
import re
import struct
import subprocess

SYSTEM = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6"}
SYSTEM |= {"libpthread.so.0", "libdl.so.2", "librt.so.1"}  # parts of libc since glibc 2.34

# Mangled names of the C++ standard library and ABI (namespaces std and __cxxabiv1, operator new and
# delete); all other mangled names that are undefined are torch's (at, c10, torch, caffe2).
_STANDARD = re.compile(r"_Z(T[ISV])?N?K?(S[a-z]|St|10__cxxabiv1|N10__cxxabiv1)|_Z(nw|na|dl|da)")


def _output(library: pathlib.Path, *command: str) -> str:
    done = subprocess.run([*command, str(library)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{library.name} is no shared object: {command[0]} fails")
    return done.stdout


def undefined_symbols(library: pathlib.Path) -> set[str]:
    lines = _output(library, "nm", "-D", "--undefined-only", "--format=posix").splitlines()
    return {line.split()[0].partition("@")[0] for line in lines}


def needed_libraries(library: pathlib.Path) -> set[str]:
    """The libraries it is linked to, without those of the system. ValueError: it has no $ORIGIN run path."""
    text = _output(library, "readelf", "--dynamic")
    if "[$ORIGIN]" not in text:
        raise ValueError(f"{library.name} has no $ORIGIN run path")
    names = re.findall(r"\(NEEDED\).*\[(.*)\]", text)
    return {name for name in names if not name.startswith("ld-linux")} - SYSTEM


def unstable_symbols(library: pathlib.Path) -> set[str]:
    """The C++ names that it takes from torch, which tie it to one version: C names are the stable ABI."""
    symbols = undefined_symbols(library)
    return {name for name in symbols if name.startswith("_Z") and not _STANDARD.match(name)}


def fatbin_entries(data: bytes) -> list[set[str]]:
    """The architectures of each fat binary that nvcc embedded, as {"sm_90a", "compute_120"}."""
    magic, found = struct.pack("<IHH", 0xBA55ED50, 1, 16), []  # magic, version, size of the header
    start = data.find(magic)
    while start >= 0:
        at = start + 16
        end = at + struct.unpack_from("<Q", data, start + 8)[0]
        entries = set()
        while at < end:
            kind, header, size = struct.unpack_from("<HxxIQ", data, at)
            (number,) = struct.unpack_from("<I", data, at + 28)
            (flags,) = struct.unpack_from("<Q", data, at + 40)
            variant = "a" if flags & 1 << 20 else "f" if flags & 1 << 21 else ""
            entries.add(f"{ {1: 'compute', 2: 'sm'}[kind] }_{number}{variant}")
            at += header + size
        found.append(entries)
        start = data.find(magic, end)
    return found


def fatbin_entries_of(architectures: list[str]) -> set[str]:
    """What :func:`fatbin_entries` finds in code for these: 9.0a is sm_90a, 12.0+PTX compute_120 as well."""
    found = set()
    for entry in architectures:
        number = entry.removesuffix("+PTX").replace(".", "")
        found |= {f"sm_{number}"} | ({f"compute_{number}"} if entry.endswith("+PTX") else set())
    return found
