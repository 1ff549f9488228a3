"""Fixtures: the backend, seeds, threads; and which tests run by default.

Every operator runs its cases on every instruction set of this CPU and on the emulator (``each_case``): the edges of
the kernels and the large problems on all of them; the rest is shared out, so that each case meets one of them.
``LOWRANK_TEST_FULL=1`` runs everything everywhere, and what is marked ``slow``, which otherwise does not run.
``LOWRANK_TEST_SHARD=0/4`` runs a quarter of all tests, those whose names have that checksum.
A test marked ``large_memory(gigabytes)`` runs when twice that much memory is available.
``LOWRANK_BACKEND=reference`` tests the reference alone, for work on the tests without a build.
``LOWRANK_TEST_DEVICE=cuda`` tests the CUDA kernels alone, on the GPU: every tensor is made there.
``LOWRANK_BACKEND=triton`` tests the Triton kernels alone: there, or with ``TRITON_INTERPRET=1`` on the CPU, where
one in ``TRITON_SHARDS`` of the tests runs by default, and none that is marked ``slow`` (see test_triton.py).
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence

# Read when torch is loaded: threads that wait sleep, so that tests share a machine with other programs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch

import cases
import lowrank_kernels as lk
import tolerance
from lowrank_kernels.codebooks import code_of

# `make test` builds it; another one can be named (the emulator runs the CUDA kernels, see docs/cuda.md).
EMULATOR = pathlib.Path(__file__).parents[1] / "build/emulator/liblowrank_cuda_emulated.so"
os.environ.setdefault("LOWRANK_EMULATOR", str(EMULATOR))

# The same work on every machine: a kernel that cuts it wrongly shows only where it is cut.
THREADS = 2
torch.set_num_threads(THREADS)

FULL = os.environ.get("LOWRANK_TEST_FULL") == "1"
SHARD = tuple(map(int, os.environ.get("LOWRANK_TEST_SHARD", "0/1").split("/")))
TRITON_SHARDS = 16
ONLY_REFERENCE = os.environ.get("LOWRANK_BACKEND") == "reference"
ONLY_TRITON = os.environ.get("LOWRANK_BACKEND") == "triton"
ON_GPU = os.environ.get("LOWRANK_TEST_DEVICE") == "cuda"
if ONLY_REFERENCE:
    KERNELS = ("reference",)
elif ONLY_TRITON:
    KERNELS = ("triton",)
elif ON_GPU:
    KERNELS = ("cuda",)
else:
    # Those of this CPU, the simplest first; test_dispatch.py names the others.
    KERNELS = (*(f"cpu-{isa}" for isa in reversed(lk.backends.isas())), "emulator")
ISAS = tuple(name.removeprefix("cpu-") for name in KERNELS if name.startswith("cpu-"))


def each_case(
    everywhere: Sequence[cases.Case],
    shared: Sequence[cases.Case] = (),
    edges_of: Callable[[str], Sequence[cases.Case]] = lambda isa: (),
) -> pytest.MarkDecorator:
    """Parametrizes ``case`` and ``backend``: ``everywhere`` runs on each of ``KERNELS``, and so do the edges of its
    instruction set; ``shared`` is shared out among the instruction sets, and the emulator runs the part of the first.

    Neighbours have one case, so that its reference is computed once (``tolerance.problem``).
    """
    parts = 1 if FULL else max(1, len(ISAS))
    backends_of: dict[cases.Case, list[str]] = {}
    for number, backend in enumerate(KERNELS):
        part = [case for i, case in enumerate(shared) if i % parts == number % parts]
        isas = [name for name in ISAS if FULL or backend == f"cpu-{name}"]
        if backend == "emulator":  # the CUDA kernels' edges are in test_cuda_*.py
            isas = []
        for case in dict.fromkeys((*everywhere, *part, *(c for i in isas for c in edges_of(i)))):
            backends_of.setdefault(case, []).append(backend)
    pairs = [(case, backend) for case, names in backends_of.items() for backend in names]
    return pytest.mark.parametrize(("case", "backend"), pairs, indirect=["backend"])


@contextlib.contextmanager
def entered(name: str) -> Iterator[str]:
    """Runs the operators on one of ``KERNELS`` or "reference", and makes sure that they do."""
    kind, _, isa = name.partition("-")
    with contextlib.ExitStack() as stack:
        stack.enter_context(lk.backends.use(kind))
        if isa:
            stack.enter_context(lk.backends.use_isa(isa))
            assert lk.backends.isa() == isa
        if kind == "cuda" or (kind == "triton" and ON_GPU):
            stack.enter_context(tolerance.operands_rounded(tolerance.HARDWARE_SUMS))
            stack.enter_context(torch.device("cuda"))
        elif kind in ("emulator", "triton"):
            stack.enter_context(tolerance.operands_rounded())
        assert lk.backends.active() == kind
        yield name


@pytest.fixture(params=KERNELS)
def backend(request) -> Iterator[str]:
    """Each set of native kernels in turn."""
    with entered(request.param) as name:
        yield name


@pytest.fixture(params=dict.fromkeys((*KERNELS, "reference")))
def any_backend(request) -> Iterator[str]:
    """The native kernels and the reference: for what is not about numbers."""
    with entered(request.param) as name:
        yield name


@pytest.fixture(autouse=True)
def seeded(request) -> None:
    """The same data in every run, and for every backend of a test."""
    name = re.sub(
        r"cpu-\w+|reference|emulator|cuda|triton", "", request.node.nodeid.rpartition("/")[2]
    )
    torch.manual_seed(zlib.crc32(name.encode()))
    random.seed(name)


@pytest.fixture(autouse=True)
def enough_memory(request) -> None:
    """Checked when the test runs, not at collection: other programs come and go."""
    marker = request.node.get_closest_marker("large_memory")
    if marker is None:
        return
    if not ISAS:
        pytest.skip("these weights are pages of the operating system, for the native CPU kernels")
    needed, available = marker.args[0], available_gigabytes()
    if available < 2 * needed:
        pytest.skip(f"needs {needed} GB of memory and as much again free, has {available:.1f} GB")


def available_gigabytes() -> float:
    """What the kernel (of the operating system) thinks a new program could take."""
    meminfo = pathlib.Path("/proc/meminfo")
    if not meminfo.exists():
        return 0.0
    return int(re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())[1]) / 2**20


@pytest.fixture
def set_threads() -> Iterator:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def large_weight() -> tuple[lk.Weight4bit, lk.Weight4bit]:
    """A weight of more than 2^31 elements that takes little memory, and its last rows as a weight.

    All pages but those of the last rows are the kernel's one page of zeros; scales are zero there.
    """
    K, rows, blocksize = 2**14, 3, 4096
    N = 2**31 // K + rows
    blocks = N * K // blocksize
    packed = torch.from_numpy(np.zeros(N * K // 2, dtype=np.uint8))
    absmax = torch.zeros(blocks)
    end = packed[-rows * K // 2 :]
    end.copy_(torch.randint(0, 256, end.shape, generator=torch.Generator().manual_seed(0)))
    absmax[-rows * K // blocksize :] = 0.01
    code = code_of("nf4")
    whole = lk.Weight4bit(packed, absmax, code, torch.Size((N, K)), cases.BF16, "nf4", blocksize)
    last = (end, absmax[-rows * K // blocksize :], code, torch.Size((rows, K)))
    return whole, lk.Weight4bit(*last, cases.BF16, "nf4", blocksize)


def pytest_make_parametrize_id(config, val, argname):
    if isinstance(val, cases.Case):
        return str(val)
    if isinstance(val, torch.dtype):
        return str(val).removeprefix("torch.")
    return None


def pytest_report_header(config):
    slow = "run" if FULL else "do not run (LOWRANK_TEST_FULL=1 runs them)"
    return f"lowrank_kernels: {lk.backends.report()}; slow tests {slow}"


# What takes scalar code and the emulator seconds takes vector code milliseconds.
SLOW_BACKENDS = ("cpu-scalar", "emulator")


def pytest_collection_modifyitems(config, items):
    kept, dropped, begun = [], [], set()
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        case, backend = params.get("case"), params.get("backend")
        if isinstance(case, cases.Case) and case.slow and backend in SLOW_BACKENDS:
            item.add_marker(pytest.mark.slow)
        number = zlib.crc32(item.nodeid.rpartition("/")[2].encode())
        too_slow = not FULL and item.get_closest_marker("slow")
        if ONLY_TRITON and not ON_GPU and not FULL:
            large = isinstance(case, cases.Case) and case.N * case.K > 2_000_000
            too_slow = too_slow or large
            if not too_slow and "triton" not in item.path.stem:  # shared with the other backends
                too_slow = item.path in begun and number % TRITON_SHARDS
                begun.add(item.path)  # the first of each file runs
        elsewhere = number % SHARD[1] != SHARD[0]
        (dropped if too_slow or elsewhere else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept
