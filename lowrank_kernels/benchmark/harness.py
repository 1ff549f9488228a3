"""Measuring cases, and the result document: one JSON format, whoever measures.

A document says where and when (:func:`header`). Each of its ``cases`` has the fields of the case and, by the name of
each provider, ``median_ms``, ``q1_ms``, ``q3_ms``, ``rounds`` and the ``relative_error`` that the check found, or
``{"unavailable": why}``, or ``{"error": what}``.
The suite in bench/ adds ``limits``, and to each case ``limit_ms``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone

import torch
from tqdm import tqdm

import lowrank_kernels as lk

from . import check, machine, timing
from .case import Case, ModelCase
from .providers import Calls, Unavailable, precision

SCHEMA = 1
PASSES = 3  # how often the providers of a case take turns

AnyCase = Case | ModelCase


@dataclasses.dataclass(frozen=True)
class Provider:
    """Who computes a case.

    ``calls`` makes the calls of a case, or raises :class:`Unavailable`. ``context``: they are made and timed within it;
    a RuntimeError on entering it means that this provider is not available. ``tolerance``, ``weight``: of the check,
    see :func:`check.verify`. ``verify``: takes the place of that check.
    """

    calls: Callable[[AnyCase], Calls]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    tolerance: float = check.TOLERANCE
    weight: Callable[[int, int], torch.Tensor] | None = None
    verify: Callable[[AnyCase, list], float] | None = None

    def timer(self, case: AnyCase) -> timing.OnHost | timing.InGraph:
        """The calls of ``case``, checked and ready to be timed."""
        calls, errors = self.calls(case), []

        def verify(outputs: list) -> None:
            if self.verify:
                errors.append(self.verify(case, outputs))
            else:
                errors.append(check.verify(case, outputs, self.tolerance, self.weight))

        if case.op != "model" and case.device == "cuda":
            timer = timing.InGraph(calls, verify, adds=case.op == "multi_lora_")
        else:
            timer = timing.OnHost(calls, verify, case.device)
        timer.about["relative_error"] = max(errors)
        return timer

    @contextlib.contextmanager
    def entered(self):
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.context())
            except RuntimeError as reason:
                raise Unavailable(first_line(reason)) from None
            yield


def with_medium(providers: dict[str, Provider]) -> dict[str, Provider]:
    """``providers``, and each once more where float32 may be rounded to bfloat16, see :func:`precision`."""

    @contextlib.contextmanager
    def both(context: Callable):
        with context(), precision("medium"):
            yield

    return providers | {
        f"{name}, medium": dataclasses.replace(
            p,
            context=functools.partial(both, p.context),
            tolerance=max(p.tolerance, check.TOLERANCE),
        )
        for name, p in providers.items()
    }


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def run(
    entries: Iterable[tuple[AnyCase, dict[str, Provider]]],
    seconds: float,
    passes: int = PASSES,
    deadline: float = float("inf"),
) -> Iterator[dict]:
    """What :func:`measure` found of each case, as it stands in a document; a bar shows the progress."""
    with tqdm(unit="turn", desc="Timing", disable=None) as bar:
        for case, providers in entries:
            words = where(case.document())
            if bar.disable:  # if it hangs, this line is the last one
                print(words, file=sys.stderr, flush=True)

            def turn(name: str, words: str = words) -> None:
                bar.set_postfix_str(f"{words} {name}", refresh=False)
                bar.update()

            results = measure(case, providers, seconds, passes, deadline, turn)
            yield case.document() | {"providers": results}


def measure(
    case: AnyCase,
    providers: dict[str, Provider],
    seconds: float,
    passes: int = PASSES,
    deadline: float = float("inf"),
    turn: Callable[[str], None] = lambda name: None,
) -> dict[str, dict]:
    """name -> result of each provider; they take turns.

    ``seconds``: timed per provider. ``deadline``: the time.monotonic() after which no turn begins. ``turn`` is told
    whose turn begins.
    """
    timers: dict[str, timing.OnHost | timing.InGraph] = {}
    taken: dict[str, list[float]] = {}
    failed: dict[str, dict] = {}
    for name in list(providers) * passes:
        turn(name)
        if name in failed:
            continue
        try:
            if time.monotonic() > deadline:
                if name in taken:
                    continue
                raise Unavailable("no time was left")
            with providers[name].entered():
                if name not in timers:
                    timers[name] = providers[name].timer(case)
                taken.setdefault(name, []).extend(timers[name].measure(seconds / passes))
        except Unavailable as reason:
            failed[name] = {"unavailable": str(reason)}
        except Exception as error:  # of any library: the results say so, the others go on
            failed[name] = {"error": first_line(error)}
    found = {name: failed.get(name) or timing.summary(taken[name]) for name in providers}
    for name in found.keys() - failed.keys():
        found[name] |= timers[name].about | case.rate(found[name])
    return found


# -- the result document ---------------------------------------------------------------------------


def header(device: str) -> dict:
    """Where and when: everything a reader needs to judge the numbers, nothing that names a host."""
    report = lk.backends.report()
    document = {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "cpu": machine.cpu(),
        "isa": report["isa"],
        "backend": report["active"],
        "threads": torch.get_num_threads(),
        "versions": machine.versions(),
    }
    if device == "cuda":
        document |= {"backend": "cuda", "gpu": machine.gpu()}
    return document


def failures(document: dict) -> list[str]:
    """A line for each result that is an error: who, where, what."""
    return [
        f"{name} failed, {where(case)}: {result['error']}"
        for case in document["cases"]
        for name, result in case["providers"].items()
        if "error" in result
    ]


def where(case: dict) -> str:
    if case["op"] == "model":
        return f"{case['model']} {case['phase']}"
    return f"{case['op']} {case['N']}x{case['K']}" + (f" M={case['M']}" if case["M"] else "")


def key(case: dict) -> tuple:
    """What tells a case of a document from others."""
    results = ("providers", "limit_ms", "flops", "bytes")
    return tuple(sorted((name, value) for name, value in case.items() if name not in results))


def read(path: pathlib.Path) -> dict:
    """A result document. Raises ValueError for a file that is none, or of a format that is newer than this program."""
    document = json.loads(path.read_text())
    schema = document.get("schema") if isinstance(document, dict) else None
    if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
        raise ValueError(f"{path}: expected results with schema 1 to {SCHEMA}, got {schema}")
    return document
