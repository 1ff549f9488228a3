"""How a call is timed, and what is kept of it.

Rules, each against a way of fooling oneself:

- *Cold* cases rotate over enough copies of the weight that none is still in the last-level cache
  when its turn comes; a model never finds its next layer there. *Hot* cases reuse one copy.
- Every buffer is written before it is timed: untouched pages of ``torch.empty`` all read one zero
  page.
- Providers alternate within a case, several times over, so that a slow minute of the machine hits
  all of them.
- Medians and quartiles, never means or minima; only the two machine limits take the best round.
- The limits (read bandwidth, float32 matrix product) are measured in the same run, at
  moments spread over it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone

import torch

import lowrank_kernels as lk
from lowrank_kernels.cli import machine

from . import providers
from .cases import Case

SCHEMA = 1
READ_BYTES = 512 << 20
SGEMM_SIZE = 2048
MAX_ROUNDS = 40  # per pass
SLOW_SECONDS = 0.2
SHORT_SECONDS = 0.05  # calls shorter than this are preceded by an untimed one in every pass


@dataclasses.dataclass
class Settings:
    """``passes``: turns each provider of a case gets; ``seconds``: timed per case and provider."""

    passes: int = 4
    seconds: float = 0.5
    quick: bool = False


class Harness:
    """One run: the calls of the present case, how many rounds each gets, and who is missing."""

    def __init__(self, settings: Settings | None = None):
        self.settings = settings or Settings()
        self.unavailable: dict[tuple[Case, str], str] = {}
        self._case: Case | None = None
        self._calls: dict[str, itertools.cycle] = {}
        self._rounds: dict[tuple[Case, str], int] = {}
        self._short: dict[tuple[Case, str], bool] = {}

    def time(self, benchmark, case: Case, name: str, provider: Callable) -> None:
        """One pass of one provider, through pytest-benchmark's ``benchmark`` fixture.

        Raises providers.Unavailable where the provider cannot run the case, and remembers why.
        """
        key = (case, name)
        if key in self.unavailable:
            raise providers.Unavailable(self.unavailable[key])
        if case != self._case:  # drop the tensors of the last case before making new ones
            self._case, self._calls = case, {}
        try:
            if name not in self._calls:
                self._calls[name] = itertools.cycle(provider(case))
            calls = self._calls[name]
            self._warm_up(key, calls)
        except providers.Unavailable as reason:
            self.unavailable[key] = str(reason)
            raise
        benchmark.extra_info |= {"case": dataclasses.asdict(case), "provider": name}
        benchmark.pedantic(
            lambda call: call(), setup=lambda: ((next(calls),), {}), rounds=self._rounds[key]
        )

    def _warm_up(self, key: tuple[Case, str], calls: itertools.cycle) -> None:
        """Untimed calls; the first time also how many timed rounds fit into a pass."""
        if key in self._rounds:
            if self._short[key]:
                next(calls)()
            return
        seconds = float("inf")
        for _ in range(
            2
        ):  # the first call also allocates and starts threads: a short one is repeated
            start = time.perf_counter()
            next(calls)()
            seconds = min(seconds, time.perf_counter() - start)
            if seconds > SLOW_SECONDS:
                break
        per_pass = self.settings.seconds / self.settings.passes
        self._rounds[key] = min(MAX_ROUNDS, max(1, round(per_pass / seconds)))
        self._short[key] = seconds < SHORT_SECONDS


# -- the limits of the machine ---------------------------------------------------------------------


def read_call() -> Callable:
    """Reads READ_BYTES with all threads: more than any cache holds, and written beforehand."""
    buffer = torch.ones(READ_BYTES // 4)
    return buffer.sum


def sgemm_call() -> Callable:
    """A float32 matrix product that is limited by arithmetic alone."""
    a, b = torch.randn(2, SGEMM_SIZE, SGEMM_SIZE)
    out = torch.zeros(SGEMM_SIZE, SGEMM_SIZE)
    return lambda: torch.mm(a, b, out=out)


LIMITS = {"read": read_call, "sgemm": sgemm_call}


def limits_of(best_seconds: dict[str, float]) -> dict[str, float]:
    """GB/s and GFLOP/s from the best round of each call in LIMITS."""
    return {
        "read_gbs": READ_BYTES / best_seconds["read"] / 1e9,
        "sgemm_gflops": 2 * SGEMM_SIZE**3 / best_seconds["sgemm"] / 1e9,
    }


# -- from pytest-benchmark's JSON to ours ----------------------------------------------------------


def _summary(seconds: list[float]) -> dict[str, float | int]:
    low, median, high = (
        statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    )
    return {
        "median_ms": median * 1e3,
        "q1_ms": low * 1e3,
        "q3_ms": high * 1e3,
        "rounds": len(seconds),
    }


def collect(raw: dict, unavailable: dict[tuple[Case, str], str], quick: bool) -> dict:
    """The result document: machine, limits, and per case the median and quartiles of each provider.

    ``raw`` is pytest-benchmark's JSON; the rounds of all passes of a provider are put together.
    """
    rounds: dict[Case, dict[str, list[float]]] = {}
    best: dict[str, float] = {}
    for entry in raw["benchmarks"]:
        info, data = entry["extra_info"], entry["stats"]["data"]
        if "limit" in info:
            best[info["limit"]] = min([*data, best.get(info["limit"], float("inf"))])
        else:
            of_case = rounds.setdefault(Case(**info["case"]), {})
            of_case.setdefault(info["provider"], []).extend(data)
    for case, _ in unavailable:
        rounds.setdefault(case, {})
    limits = limits_of(best)
    documents = []
    for case, of_case in rounds.items():
        measured = {name: _summary(seconds) for name, seconds in of_case.items()}
        missing = {n: {"unavailable": why} for (c, n), why in unavailable.items() if c == case}
        documents.append(
            dataclasses.asdict(case)
            | {
                "flops": case.flops,
                "bytes": case.bytes,
                "limit_ms": case.limit_seconds(**limits) * 1e3,
                "providers": measured | missing,
            }
        )
    return {**header(quick), "limits": limits, "cases": documents}


def header(quick: bool) -> dict:
    """Where and when: everything a reader needs to judge the numbers, nothing that names a host."""
    report = lk.backends.report()
    return {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "quick": quick,
        "cpu": machine.cpu(),
        "isa": report["isa"],
        "backend": report["active"],
        "threads": torch.get_num_threads(),
        "versions": machine.versions(),
    }


def load_average() -> float | None:
    """How many programs wanted to run in the last minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def machine_name(document: dict) -> str:
    """A file name for the machine: CPU model, instruction set, threads."""
    model = str(document["cpu"]["model"]).lower()
    for noise in ("(r)", "(tm)", "processor", "cpu"):
        model = model.replace(noise, " ")
    words = "".join(c if c.isalnum() or c == "." else " " for c in model).split()
    return "-".join([*words, str(document["isa"] or "reference"), f"{document['threads']}threads"])


def write_json(document: dict, path: pathlib.Path) -> None:
    """Written beside its destination and renamed: never half a file, never a lost old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(temporary, path)
