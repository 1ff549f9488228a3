"""``bench``: time per call of the operators at sizes of one's own, or of a whole model, against what else is installed.

The providers, their cases and the rules of timing are those of the benchmark suite in a source checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Iterator

import torch

import lowrank_kernels as lk

from .. import files
from ..benchmark import harness, machine, models, report, timing
from ..benchmark.case import Case
from ..benchmark.harness import AnyCase, Provider
from ..benchmark.ops import ADAPTERS, OPS, OURS
from . import UserError
from .models import loader, require


def run(args: argparse.Namespace) -> int:
    """Measures, prints tables, writes what was asked for. 1 if a result was wrong."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device")
    if args.medium and device == "cuda":
        raise UserError("--medium: what it permits is measured on CPUs only")
    if args.plot:
        require("matplotlib")
    _check_files(args)
    ours = _ours(args)
    if device == "cpu":
        timing.keep_freed_memory()
        load = machine.load_average()
        if load is not None and load > machine.BUSY:
            print(f"load average {load:.1f}: other programs disturb the result", file=sys.stderr)
    document = harness.header(device)
    entries = _of_model(args, device, ours) if args.model else _of_operators(args, device, ours)
    document["cases"] = list(harness.run(entries, args.seconds))
    print(report.text(document))
    if args.json:
        files.write_json(document, args.json)
    if args.plot:
        from . import pictures

        pictures.times(args.plot, document)
    for path in (args.json, args.plot):
        if path:
            print(f"wrote {path}")
    return 1 if harness.failures(document) else 0


def _check_files(args: argparse.Namespace) -> None:
    """Before anything is timed: the files can be written, and --json replaces nothing but earlier results."""
    try:
        if args.json:
            files.check_replaceable(args.json, ("cases",))
        if args.plot:
            files.check_writable(args.plot)
    except ValueError as error:
        raise UserError(str(error)) from None


Entries = Iterator[tuple[AnyCase, dict[str, Provider]]]


def _dtypes(args: argparse.Namespace, device: str) -> list[str]:
    return args.dtype or (["bfloat16"] if device == "cuda" else ["float32"])


def _of_operators(args: argparse.Namespace, device: str, ours: dict) -> Entries:
    """Each case and who computes it; shapes vary slowest, since making weights takes its time."""
    dtypes, cache = _dtypes(args, device), "hot" if args.hot else "cold"
    for (N, K), name, dtype, M in itertools.product(args.shape, args.op, dtypes, args.m):
        op = OPS[name]
        many = str(min(M, ADAPTERS)) if name == "multi_lora" else ""
        rank = args.rank if op.adapter else 0
        providers = {column: Provider(op.ours, context) for column, context in ours.items()}
        for peer, calls in op.peers.items():
            if peer.split()[0] in args.peers:
                providers[peer] = Provider(calls)
        if args.medium and dtype == "float32":
            providers = harness.with_medium(providers)
        yield Case(op.op, N, K, M, dtype, cache, rank, device, many), providers


def _of_model(args: argparse.Namespace, device: str, ours: dict) -> Entries:
    """A whole model in each phase, with adapters; every dtype loads it again."""
    load, name = loader(args.model)
    columns = {column: (OURS, context) for column, context in ours.items()}
    others = (models.PEFT, models.FUSED) if list(ours) == [OURS] else ()
    peers = [n for n in (models.DENSE, models.BITSANDBYTES) if n.split()[0] in args.peers]
    columns |= {who: (who, contextlib.nullcontext) for who in (*others, *peers)}
    for dtype in _dtypes(args, device):
        yield from models.entries(name, load, columns, dtype, args.rank, device, args.medium)


def _ours(args: argparse.Namespace) -> dict:
    """name of a column -> the context in which this library runs there. Raises UserError for what is not here."""
    found = {}
    asked = [("isa", lk.backends.use_isa, name) for name in args.isa or ()]
    asked += [("backend", lk.backends.use, name) for name in args.backend or ()]
    for option, use, name in asked:
        try:
            with use(name):
                pass
        except (ValueError, RuntimeError) as error:
            raise UserError(f"--{option}: {harness.first_line(error)}") from None
        found[f"{OURS}, {name}"] = lambda use=use, name=name: use(name)
    if found:
        return found
    kernels = lk.backends.report()
    if kernels["active"] not in kernels["available"]:
        raise UserError(f"no kernels ({kernels['build']})")
    return {OURS: contextlib.nullcontext}
