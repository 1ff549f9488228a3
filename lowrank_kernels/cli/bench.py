"""``bench``: time per call of the operators at sizes of one's own, against what else is installed.

The providers, their cases and the rules of timing are those of the benchmark suite in a source checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone

import torch
from tqdm import tqdm

import lowrank_kernels as lk

from .. import files, tables
from ..benchmark import check, cuda, multi_providers, providers, timing
from ..benchmark.case import Case
from . import UserError, machine, models

OURS = "lowrank_kernels"
PASSES = 3
ADAPTERS = 4  # of multi_lora, or as many as there are rows
Provider = Callable[[Case], providers.Calls]


@dataclasses.dataclass(frozen=True)
class Op:
    """An operator as the user names it: what it is, and who computes it."""

    title: str
    op: str
    ours: Provider
    peers: dict[str, Provider]
    adapter: bool = False


OPS = {
    "linear": Op(
        "y = x Wᵀ",
        "linear_4bit",
        providers.linear_lowrank,
        {
            "torch": providers.linear_torch,
            "bitsandbytes": providers.linear_bitsandbytes,
            "dequantize": providers.linear_dequantize,
        },
    ),
    "dx": Op(
        "dx = dy W",
        "linear_4bit_dx",
        providers.dx_lowrank,
        {
            "torch": providers.dx_torch,
            "bitsandbytes": providers.dx_bitsandbytes,
            "dequantize": providers.dx_dequantize,
        },
    ),
    "lora": Op(
        "base + LoRA, forward",
        "lora_linear_4bit",
        providers.lora_lowrank,
        {
            "torch": providers.lora_peft_dense,
            "bitsandbytes": providers.lora_peft_bitsandbytes,
            "dequantize": providers.lora_dequantize,
        },
        adapter=True,
    ),
    "training": Op(
        "base + LoRA, forward and gradients of x, A, B",
        "lora_linear_4bit_fwd_bwd",
        providers.lora_lowrank,
        {
            "torch": providers.lora_peft_dense,
            "bitsandbytes": providers.lora_peft_bitsandbytes,
            "dequantize": providers.lora_dequantize,
        },
        adapter=True,
    ),
    "multi_lora": Op(
        f"base + {ADAPTERS} adapters in one batch, forward",
        "multi_lora_linear_4bit",
        multi_providers.many_linear_lowrank,
        {"torch": multi_providers.many_linear_loop},
        adapter=True,
    ),
}
PEERS = ("torch", "bitsandbytes", "dequantize")


def run(args: argparse.Namespace) -> int:
    """Measures, prints tables, writes what was asked for. 1 if a result was wrong."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device")
    if args.plot:
        models.require("matplotlib")
    for path in (args.json, args.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"{path}: expected an existing folder")
    kernels = _kernels(args)
    if device == "cpu":
        timing.keep_freed_memory()
        load = machine.load_average()
        if load is not None and load > machine.BUSY:
            print(f"load average {load:.1f}: other programs disturb the result", file=sys.stderr)
    document = _header(device) | {"cases": []}
    cases = _cases(args, device)
    steps = sum(PASSES * len(_providers(args, name, kernels)) for name, _ in cases)
    with tqdm(total=steps, unit="turn", desc="Timing", disable=None) as bar:
        for name, case in cases:
            results = _measure(case, _providers(args, name, kernels), args.seconds, bar)
            document["cases"].append(
                dataclasses.asdict(case) | {"name": name, "providers": results}
            )
    print(text(document))
    if args.json:
        files.write_json(document, args.json)
    if args.plot:
        from . import pictures

        pictures.times(args.plot, document, {name: op.title for name, op in OPS.items()})
    for path in (args.json, args.plot):
        if path:
            print(f"wrote {path}")
    wrong = [r for case in document["cases"] for r in case["providers"].values() if "error" in r]
    return 1 if wrong else 0


def _cases(args: argparse.Namespace, device: str) -> list[tuple[str, Case]]:
    """(name of the operator, case); shapes vary slowest, since making weights takes its time."""
    dtypes = args.dtype or (["bfloat16"] if device == "cuda" else ["float32"])
    found = []
    for (N, K), name, dtype, M in itertools.product(args.shape, args.op, dtypes, args.m):
        op = OPS[name]
        rank = args.rank if op.adapter else 0
        many = str(min(M, ADAPTERS)) if name == "multi_lora" else ""
        cache = "hot" if args.hot else "cold"
        found.append((name, Case(op.op, N, K, M, dtype, cache, rank, device, many)))
    return found


# -- who is timed ------------------------------------------------------------------------------------


def _kernels(
    args: argparse.Namespace,
) -> dict[str, Callable[[], contextlib.AbstractContextManager]]:
    """name of a column -> the context in which this library runs there. Raises UserError for what is not here."""
    found: dict[str, Callable] = {}
    asked = [("isa", lk.backends.use_isa, name) for name in args.isa or ()]
    asked += [("backend", lk.backends.use, name) for name in args.backend or ()]
    for option, use, name in asked:
        try:
            with use(name):
                pass
        except (ValueError, RuntimeError) as error:
            raise UserError(f"--{option}: {str(error).splitlines()[0]}") from None
        found[f"{OURS}, {name}"] = lambda use=use, name=name: use(name)
    if found:
        return found
    report = lk.backends.report()
    if report["active"] not in report["available"]:
        raise UserError(f"no kernels ({report['build']})")
    return {OURS: contextlib.nullcontext}


def _providers(
    args: argparse.Namespace, name: str, kernels: dict[str, Callable]
) -> dict[str, tuple[Callable, Provider]]:
    op = OPS[name]
    ours = {column: (context, op.ours) for column, context in kernels.items()}
    wanted = [peer for peer in args.peers if peer in op.peers]
    return ours | {peer: (contextlib.nullcontext, op.peers[peer]) for peer in wanted}


# -- timing ------------------------------------------------------------------------------------------


class _OnCPU:
    """A provider's calls of one case, checked once."""

    def __init__(self, case: Case, provider: Provider):
        calls = provider(case)
        check.verify(case, [calls[0]()])
        self.calls: Iterator[Callable] = itertools.cycle(calls)
        self.rounds = 0

    def measure(self, seconds: float) -> list[float]:
        if not self.rounds:
            self.rounds = timing.rounds(timing.warm_up(self.calls), seconds)
        else:
            next(self.calls)()
        return [timing.of(next(self.calls)) for _ in range(self.rounds)]


def _on_gpu(case: Case, provider: Provider) -> cuda.Timed:
    return cuda.Timed(provider(case), lambda outputs: check.verify(case, outputs))


def _measure(
    case: Case, of_case: dict[str, tuple[Callable, Provider]], seconds: float, bar: tqdm
) -> dict[str, dict]:
    """name -> median and quartiles, or {"unavailable": why}, {"error": what}. Providers take turns."""
    make = _on_gpu if case.device == "cuda" else _OnCPU
    timers: dict[str, object] = {}
    taken: dict[str, list[float]] = {}
    failed: dict[str, dict] = {}
    for _, name in itertools.product(range(PASSES), of_case):
        bar.set_postfix_str(f"{case.op} {case.N}x{case.K} M={case.M} {name}", refresh=False)
        context, provider = of_case[name]
        if name not in failed:
            try:
                with context():
                    if name not in timers:
                        timers[name] = make(case, provider)
                    taken.setdefault(name, []).extend(timers[name].measure(seconds / PASSES))
            except providers.Unavailable as reason:
                failed[name] = {"unavailable": str(reason)}
            except Exception as error:  # of any library: it says so in the table, the others go on
                words = str(error).strip().splitlines() or [type(error).__name__]
                failed[name] = {"error": words[0]}
        bar.update()
    return {name: failed.get(name) or timing.summary(taken[name]) for name in of_case}


def _header(device: str) -> dict:
    report = lk.backends.report()
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "cpu": machine.cpu(),
        "isa": report["isa"],
        "backend": report["active"],
        "threads": torch.get_num_threads(),
        "versions": machine.versions(),
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


# -- tables ------------------------------------------------------------------------------------------


def groups(document: dict) -> dict[tuple, list[dict]]:
    """Cases that differ in M alone, by (name, N, K, dtype)."""
    found: dict[tuple, list[dict]] = {}
    for case in document["cases"]:
        key = (case["name"], case["N"], case["K"], case["dtype"])
        found.setdefault(key, []).append(case)
    return found


def text(document: dict) -> str:
    """A table for each operator, shape and dtype, and why something is missing in it."""
    where = document.get("gpu") or f"{document['cpu']['model']}, {document['isa']}"
    lines = [
        f"{where}, {document['threads']} threads; milliseconds, and how many times faster we are"
    ]
    reasons: dict[str, str] = {}
    for (name, N, K, dtype), cases in groups(document).items():
        columns = list(cases[0]["providers"])
        rows = [["M", *columns]]
        for case in cases:
            rows.append([str(case["M"]), *(_cell(case, column, columns[0]) for column in columns)])
            for column in columns:
                result = case["providers"][column]
                if why := result.get("unavailable") or result.get("error"):
                    reasons.setdefault(column, why)
        cache = cases[0]["cache"]
        rank = f", r = {cases[0]['R']}" if cases[0]["R"] else ""
        lines += ["", f"{name}: {OPS[name].title}{rank}; {N} x {K}, {dtype}, {cache} caches", ""]
        lines.append(tables.text(rows))
    lines += [f"\n{column}: {why}" for column, why in reasons.items()]
    return "\n".join(lines)


def _cell(case: dict, column: str, first: str) -> str:
    result, ours = case["providers"][column], case["providers"][first]
    if "median_ms" not in result:
        return "failed" if "error" in result else "-"
    words = tables.digits(result["median_ms"])
    if column == first or "median_ms" not in ours:
        return words
    return f"{words} {tables.times_faster(result['median_ms'] / ours['median_ms']):>6}"
