"""One run of the suite: pytest-benchmark's rounds, what is missing and why, the result document.

The rules of timing are in ``lowrank_kernels/benchmark/timing.py``. The limits of the machine (bandwidth, matrix
product) are measured in the same run, at moments spread over it; they alone take the best round. On a GPU
``cuda.py`` takes the times instead of pytest-benchmark; all else is the same.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import itertools
import pathlib
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone

import torch

import lowrank_kernels as lk
from lowrank_kernels.benchmark import check, cuda, providers, timing
from lowrank_kernels.benchmark.case import Case
from lowrank_kernels.benchmark.timing import summary
from lowrank_kernels.cli import machine

from . import cases, limits, peer_ggml, peer_openvino

SCHEMA = 1


@dataclasses.dataclass
class Settings:
    """``passes``: turns each provider of a case gets; ``seconds``: timed per case and provider.

    ``deadline``: the time.monotonic() after which no turn begins.
    """

    passes: int = 4
    seconds: float = 0.5
    quick: bool = False
    deadline: float = float("inf")


class Harness:
    """One run: the calls of the present case, how many rounds each gets, and who is missing.

    ``on_case`` is called when a case of a GPU is finished: for results that outlive a crash.
    """

    def __init__(self, settings: Settings | None = None):
        self.settings = settings or Settings()
        self.unavailable: dict[tuple[Case, str], str] = {}
        self.errors: dict[tuple[Case, str], str] = {}
        self.on_case: Callable[[], None] = lambda: None
        # Of a GPU; what a CPU took is in pytest-benchmark's JSON.
        self.seconds: dict[tuple[Case, str], list[float]] = {}
        self.graphs: dict[tuple[Case, str], bool] = {}
        self.copies: dict[tuple[Case, str], int] = {}  # that take turns; of a CPU
        self.limits: dict[str, float] = {}
        self.states: list[dict] = []
        self._case: Case | None = None
        self._calls: dict[str, itertools.cycle | cuda.Timed] = {}
        self._rounds: dict[tuple[Case, str], int] = {}
        self._short: dict[tuple[Case, str], bool] = {}

    def time(self, benchmark, case: Case, name: str, provider: Callable) -> None:
        """One pass of one provider, on a CPU through pytest-benchmark's ``benchmark`` fixture.

        Raises providers.Unavailable where the provider cannot run the case, and remembers why. Any
        other exception is an error of the provider, remembered as well: it has no further turn.
        """
        key = (case, name)
        self._may_run(key)
        if case != self._case:  # drop the tensors of the last case before making new ones
            finished = self._case is not None and cases.DEVICE == "cuda"
            self._case, self._calls = case, {}
            if finished:
                torch.cuda.empty_cache()  # a graph's memory is no use to the next one
                self.on_case()
        try:
            if cases.DEVICE == "cuda":
                self._pass_on_gpu(key, provider)
                return
            if name not in self._calls:
                of_copies = provider(case)
                self.copies[key] = len(of_copies)
                self._calls[name] = itertools.cycle(of_copies)
            calls = self._calls[name]
            self._warm_up(key, calls)
        except providers.Unavailable as reason:
            self.unavailable[key] = str(reason)
            raise
        except Exception as error:
            self._calls.pop(name, None)
            words = str(error).strip().splitlines() or [type(error).__name__]
            self.errors[key] = words[0]
            raise
        benchmark.extra_info |= {"case": dataclasses.asdict(case), "provider": name}
        benchmark.pedantic(
            lambda call: call(), setup=lambda: ((next(calls),), {}), rounds=self._rounds[key]
        )

    def _may_run(self, key: tuple[Case, str]) -> None:
        """Raises providers.Unavailable if there is no use or no time for another turn."""
        if key in self.unavailable:
            raise providers.Unavailable(self.unavailable[key])
        if key in self.errors:
            raise providers.Unavailable(f"failed before: {self.errors[key]}")
        if time.monotonic() > self.settings.deadline:
            if not self.seconds.get(key):
                self.unavailable[key] = "no time was left"
            raise providers.Unavailable("no time was left")

    def _pass_on_gpu(self, key: tuple[Case, str], provider: Callable) -> None:
        case, name = key
        if name not in self._calls:
            verify = functools.partial(check.verify, case)
            adds = case.op == "multi_lora_"
            self._calls[name] = cuda.Timed(provider(case), verify, adds=adds)
        timed = self._calls[name]
        seconds = timed.measure(self.settings.seconds / self.settings.passes)
        self.seconds.setdefault(key, []).extend(seconds)
        self.graphs[key] = timed.graph

    def time_limit(self, benchmark, name: str) -> None:
        """One turn of a limit of the machine."""
        if cases.DEVICE == "cuda":
            call, device = cuda.LIMITS[name](), cuda.Device()
            device.times(call, 2)
            self._keep_limit(name, min(device.times(call, limits.LIMIT_ROUNDS)))
            if name == list(cuda.LIMITS)[-1] and (state := cuda.state()):
                self.states.append(state)
            return
        if name == limits.AVX2:
            self._keep_limit(name, limits.sgemm_avx2_seconds())
            return
        benchmark.extra_info["limit"] = name
        call = limits.LIMITS[name]()
        benchmark.pedantic(call, rounds=limits.LIMIT_ROUNDS, warmup_rounds=2)

    def _keep_limit(self, name: str, seconds: float) -> None:
        self.limits[name] = min(seconds, self.limits.get(name, float("inf")))

    def _warm_up(self, key: tuple[Case, str], calls: itertools.cycle) -> None:
        """Untimed calls; the first time also how many timed rounds fit into a pass."""
        if key in self._rounds:
            if self._short[key]:
                next(calls)()
            return
        seconds = timing.warm_up(calls)
        self._rounds[key] = timing.rounds(seconds, self.settings.seconds / self.settings.passes)
        self._short[key] = seconds < timing.SHORT_SECONDS


# -- the result document ---------------------------------------------------------------------------


def collect(raw: dict, run: Harness) -> dict:
    """The result document: machine, limits, and per case the median and quartiles of each provider.

    ``raw`` is pytest-benchmark's JSON; the rounds of all passes of a provider are put together.
    """
    rounds = {key: list(seconds) for key, seconds in run.seconds.items()}
    best = dict(run.limits)
    for entry in raw["benchmarks"]:
        info, data = entry["extra_info"], entry["stats"]["data"]
        if "limit" in info:
            best[info["limit"]] = min([*data, best.get(info["limit"], float("inf"))])
        else:
            rounds.setdefault((Case(**info["case"]), info["provider"]), []).extend(data)
    of_machine = cuda.limits_of(best) if "copy" in best else limits.limits_of(best)
    results: dict[Case, dict[str, dict]] = {}
    for key, seconds in rounds.items():
        more = {"graph": run.graphs[key]} if key in run.graphs else {}
        more |= {"copies": run.copies[key]} if key in run.copies else {}
        results.setdefault(key[0], {})[key[1]] = summary(seconds) | more
    for word, reasons in (("unavailable", run.unavailable), ("error", run.errors)):
        for (case, name), why in reasons.items():
            results.setdefault(case, {})[name] = {word: why}
    documents = [
        dataclasses.asdict(case)
        | {
            "flops": case.flops,
            "bytes": case.bytes,
            "limit_ms": case.limit_seconds(*limits.rates(of_machine)) * 1e3,
            "providers": of_case,
        }
        for case, of_case in results.items()
    ]
    return {**header(run), "limits": of_machine, "cases": documents}


def header(run: Harness) -> dict:
    """Where and when: everything a reader needs to judge the numbers, nothing that names a host."""
    report = lk.backends.report()
    document = {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "quick": run.settings.quick,
        "commit": _commit(),
        "cpu": machine.cpu(),
        "isa": report["isa"],
        "backend": report["active"],
        "threads": torch.get_num_threads(),
        "versions": machine.versions(),
    }
    if cases.DEVICE == "cuda":
        document["backend"] = "cuda"
        document["gpu"] = cuda.facts() | {"states": run.states}
        try:
            document["versions"]["triton"] = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            document["versions"]["triton"] = None
    else:
        peers = {"openvino": peer_openvino.version(), "ggml": peer_ggml.version()}
        document["versions"] |= peers
    return document


def _commit() -> str | None:
    """The commit of this checkout, "+" if files differ from it; None outside a repository."""
    words = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always"]
    try:
        done = subprocess.run(
            [*words, "--dirty=+", "--exclude=*"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
