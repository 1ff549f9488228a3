"""How calls are timed, on a CPU and on a GPU.

Rules, each against a way of fooling oneself:

- *Cold* cases rotate over enough copies of the weight that none is still in the last-level cache
  when its turn comes; a model never finds its next layer there. *Hot* cases reuse one copy.
- Every buffer is written before it is timed: untouched pages of ``torch.empty`` all read one zero
  page. Outputs get memory that was used before (:func:`keep_freed_memory`): fresh pages cost more
  than what is written to them, for every provider alike.
- Providers alternate within a case, several times over, so that a slow minute of the machine hits
  all of them.
- Nothing is timed before its results were compared with the dense product, those of a graph too.
- Medians and quartiles, never means or minima.
- On a GPU all calls of a provider, one per copy of the weight, are captured into one CUDA graph, again and
  again until it runs for GRAPH_SECONDS; its replay is timed with events, so neither Python nor the launches
  show. What cannot be captured, because it waits for the device, is timed as a loop; its results say so.

``torch.utils.benchmark.Timer`` repeats one statement without an untimed turn to the next weight or provider, and
``triton.testing.do_bench_cudagraph`` one call on one set of tensors, which is hot: neither can keep these rules.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import statistics
import time
from collections.abc import Callable

import torch

MAX_ROUNDS = 40  # per pass
SLOW_SECONDS = 1.0  # calls shorter than this are preceded by an untimed one in the first pass
SHORT_SECONDS = 0.05  # and shorter than this in every pass
# On a GPU:
GRAPH_SECONDS = 1e-3
WARM_SECONDS = 5e-3  # before each pass: clocks that fell while the host prepared rise again
MIN_REPLAYS = 3  # per pass
MAX_CALLS = 1024  # in one graph
LEAD_CYCLES = 1_000_000  # about half a millisecond

Check = Callable[[list], None]  # takes the outputs of calls, and raises if one is wrong


class NotCapturable(Exception):
    """Why the calls of a provider cannot be one CUDA graph."""


def _rounds(seconds: float, budget: float) -> int:
    """How many calls of so many seconds fit into a pass."""
    return min(MAX_ROUNDS, max(1, round(budget / max(seconds, 1e-9))))


class OnHost:
    """The calls of one provider on one case, which take turns, timed by the clock of the host.

    A call may have an attribute ``prepare``, a function that runs before it each time and is not timed. ``device``:
    where it is "cuda", the clock stops when the device is done. ``calls`` gives the next one without end.
    """

    def __init__(self, calls: list[Callable], check: Check, device: str = "cpu"):
        self.about = {"copies": len(calls)}
        self._wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.calls, self._passes = itertools.cycle(calls), 0
        self._first = self._time(check)  # it also allocates and starts threads

    def _time(self, check: Check = lambda outputs: None) -> float:
        call = next(self.calls)
        getattr(call, "prepare", lambda: None)()
        self._wait()
        start = time.perf_counter()
        output = call()
        self._wait()
        seconds = time.perf_counter() - start
        check([output])
        return seconds

    def rounds(self, seconds: float) -> int:
        """How many calls fit into a pass that begins now; a short one is timed again before: the first is slow."""
        if self._first < SHORT_SECONDS or (not self._passes and self._first < SLOW_SECONDS):
            self._first = min(self._first, self._time())
        self._passes += 1
        return _rounds(self._first, seconds)

    def measure(self, seconds: float) -> list[float]:
        """One pass: the seconds of each call, for as many calls as fit."""
        rounds = self.rounds(seconds)
        collecting = gc.isenabled()
        gc.disable()
        try:
            return [self._time() for _ in range(rounds)]
        finally:
            if collecting:
                gc.enable()


class Device:
    """What :class:`InGraph` asks of a GPU; the tests have one of their own."""

    def capture(self, calls: list[Callable]) -> tuple[Callable, list]:
        """A function that replays ``calls`` as one graph, and the outputs that it writes.

        All outputs are held until the capture ends, so that none reuses another's memory.
        """
        _refuse_to_wait(calls[0])
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            calls[0]()  # what libraries set up once per stream must not happen in the capture
            torch.cuda.synchronize()
            # Not torch.cuda.graph(): it empties the allocator's cache at every capture.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                outputs = [call() for call in calls]
                graph.capture_end()
            except Exception as error:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise NotCapturable(str(error).strip().splitlines()[0]) from None
        torch.cuda.current_stream().wait_stream(stream)
        return graph.replay, outputs

    def times(self, run: Callable, rounds: int) -> list[float]:
        """Seconds of each of ``rounds`` calls of ``run``, back to back on the device."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
        torch.cuda.synchronize()
        torch.cuda._sleep(LEAD_CYCLES)  # the host queues its work meanwhile: no gaps later
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def _refuse_to_wait(call: Callable) -> None:
    """Raises NotCapturable if ``call`` makes the host wait: found out before a capture breaks."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise NotCapturable("it waits for the device") from None
    finally:
        torch.cuda.set_sync_debug_mode("default")


class InGraph:
    """The calls of one provider on one case, in one CUDA graph where they can be captured.

    ``adds``: each call adds its result to an output of its own, which was zero before.
    """

    def __init__(
        self, calls: list[Callable], check: Check, device: Device | None = None, adds: bool = False
    ):
        self.device = device or Device()
        check([call() for call in calls])

        def loop() -> None:
            for call in calls:
                call()

        self.run, self.calls, self.reason = loop, len(calls), ""
        seconds = min(self.device.times(loop, 2))
        # What a loop takes may be mostly launches, so this many rotations may be too few: the
        # first replay tells.
        repeats = self._repeats(seconds)
        try:
            run, outputs = self.device.capture(calls * repeats)
            seconds = min(self.device.times(run, 2))
            if self._repeats(seconds / repeats) > 2 * repeats:
                repeats = self._repeats(seconds / repeats)
                run, outputs = self.device.capture(calls * repeats)
            self.run, self.calls = run, len(calls) * repeats
        except NotCapturable as reason:
            self.reason = str(reason)
        else:
            if adds:  # a graph of one rotation: the other adds as often as it repeats
                run, outputs = self.device.capture(calls)
            _fill(outputs, 0.0 if adds else float("nan"))
            run()
            check(outputs)
        self.about = {"graph": not self.reason}
        self._seconds = min(self.device.times(self.run, 2))

    def _repeats(self, seconds: float) -> int:
        """How many rotations over all copies fill GRAPH_SECONDS, if one takes ``seconds``."""
        wanted = round(GRAPH_SECONDS / max(seconds, 1e-9))
        return max(1, min(wanted, MAX_CALLS // self.calls))

    def measure(self, seconds: float) -> list[float]:
        """One pass: seconds per call, a mean over all copies, for as many replays as fit."""
        self.device.times(self.run, _rounds(self._seconds, WARM_SECONDS))
        replays = max(MIN_REPLAYS, _rounds(self._seconds, seconds))
        return [time / self.calls for time in self.device.times(self.run, replays)]


def _fill(outputs: list, value: float) -> None:
    """Fills floating results, so that one which a replay does not write is found out."""
    for output in outputs:
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.data.fill_(value)


def keep_freed_memory() -> bool:
    """Has glibc keep all that is freed, for this process and for good; False without glibc.

    By default it returns large blocks to the system, or not: that hangs on what was freed before.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):
        return False
    kept = {-4: 0, -1: (1 << 31) - 1}  # M_MMAP_MAX: no blocks of their own, M_TRIM_THRESHOLD
    return all([mallopt(option, value) == 1 for option, value in kept.items()])


def summary(seconds: list[float]) -> dict[str, float | int]:
    """Median and quartiles in milliseconds, and of how many rounds."""
    low, median, high = (
        statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    )
    return {
        "median_ms": median * 1e3,
        "q1_ms": low * 1e3,
        "q3_ms": high * 1e3,
        "rounds": len(seconds),
    }
