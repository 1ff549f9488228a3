"""Timing on a CUDA device, its limits, and what it is.

- All calls of a provider, one per copy of the weight, are captured into one CUDA graph, again and
  again until it runs for GRAPH_SECONDS; what is timed is its replay, with events, so neither Python
  nor the launches show. Every call of a graph has inputs and outputs of its own.
- A provider that cannot be captured, because it waits for the device, is timed without a graph, as
  a loop over its calls; its results say so.
- Nothing is timed before its results were compared with the dense product, those of the graph too.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import os
import subprocess
from collections.abc import Callable

import torch

GRAPH_SECONDS = 1e-3
WARM_SECONDS = 5e-3  # before each pass: clocks that fell while the host prepared rise again
MIN_ROUNDS, MAX_ROUNDS = 3, 40  # replays per pass
MAX_CALLS = 1024  # in one graph
LEAD_CYCLES = 1_000_000  # about half a millisecond
COPY_BYTES = 2 << 30
MATMUL_SIZE = 8192


class NotCapturable(Exception):
    """Why the calls of a provider cannot be one CUDA graph."""


# -- calls, timed ----------------------------------------------------------------------------------


class Device:
    """What :class:`Timed` asks of a device; the tests have one of their own."""

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


class Timed:
    """The calls of one provider on one case: checked, captured if they can be, ready to be timed.

    ``check`` takes the outputs of all calls and raises if one is wrong. ``adds``: each call adds its
    result to an output of its own, which was zero before.
    """

    def __init__(
        self,
        calls: list[Callable],
        check: Callable[[list], None] = lambda outputs: None,
        device: Device | None = None,
        adds: bool = False,
    ):
        self.device = device or Device()
        check([call() for call in calls])

        def loop() -> None:
            for call in calls:
                call()

        self.run, self.calls, self.graph, self.reason = loop, len(calls), False, ""
        seconds = min(self.device.times(loop, 2))
        # What a loop takes may be mostly launches, so this many rotations may be too few: the
        # first replay tells.
        repeats = self._repeats(seconds)
        try:
            run, outputs = self._capture(calls, repeats)
            seconds = min(self.device.times(run, 2))
            if self._repeats(seconds / repeats) > 2 * repeats:
                repeats = self._repeats(seconds / repeats)
                run, outputs = self._capture(calls, repeats)
            self.run, self.graph, self.calls = run, True, len(calls) * repeats
        except NotCapturable as reason:
            self.reason = str(reason)
        else:
            if adds:  # a graph of one rotation: the other adds as often as it repeats
                run, outputs = self._capture(calls, 1)
            fill(outputs, 0.0 if adds else float("nan"))
            run()
            check(outputs)
        self.seconds = min(self.device.times(self.run, 2))

    def _repeats(self, seconds: float) -> int:
        """How many rotations over all copies fill GRAPH_SECONDS, if one takes ``seconds``."""
        wanted = round(GRAPH_SECONDS / max(seconds, 1e-9))
        return max(1, min(wanted, MAX_CALLS // self.calls))

    def _capture(self, calls: list[Callable], repeats: int) -> tuple[Callable, list]:
        return self.device.capture(calls * repeats)

    def measure(self, seconds: float) -> list[float]:
        """One pass: seconds per call, a mean over all copies, for as many replays as fit."""

        def rounds(budget: float) -> int:
            return min(MAX_ROUNDS, max(1, round(budget / max(self.seconds, 1e-9))))

        self.device.times(self.run, rounds(WARM_SECONDS))
        times = self.device.times(self.run, max(MIN_ROUNDS, rounds(seconds)))
        return [time / self.calls for time in times]


def fill(outputs: list, value: float) -> None:
    """Fills floating results, so that one which a replay does not write is found out."""
    for output in outputs:
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.detach().fill_(value)


# -- the limits of the device ----------------------------------------------------------------------


def copy_call() -> Callable:
    source = torch.ones(COPY_BYTES // 4, device="cuda")
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def write_call() -> Callable:
    target = torch.zeros(COPY_BYTES // 4, device="cuda")
    return lambda: target.fill_(1.0)


def matmul_call() -> Callable:
    """On random data: the same product of zeros is faster, since it needs less power."""
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, device="cuda").bfloat16()
    out = torch.zeros_like(a)
    return lambda: torch.mm(a, b, out=out)


LIMITS = {"copy": copy_call, "write": write_call, "matmul": matmul_call}


def limits_of(best_seconds: dict[str, float]) -> dict[str, float]:
    """GB/s (of a copy: bytes read and bytes written) and TFLOP/s from the best round of each."""
    return {
        "copy_gbs": 2 * COPY_BYTES / best_seconds["copy"] / 1e9,
        "write_gbs": COPY_BYTES / best_seconds["write"] / 1e9,
        "matmul_tflops": 2 * MATMUL_SIZE**3 / best_seconds["matmul"] / 1e12,
    }


# -- what the device is ----------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def l2_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size


def _query(*fields: str) -> list[str] | None:
    """What nvidia-smi says of the fields of the first device; None if it says nothing. Reads only."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return values if done.returncode == 0 and len(values) == len(fields) else None


def state() -> dict[str, float | None] | None:
    """Clocks, temperature and power as they are now; None where nvidia-smi does not tell."""
    fields = {
        "sm_mhz": "clocks.sm",
        "memory_mhz": "clocks.mem",
        "celsius": "temperature.gpu",
        "watts": "power.draw",
    }
    values = _query(*fields.values())
    if values is None:
        return None

    def number(text: str) -> float | None:
        try:
            return float(text)
        except ValueError:  # "[N/A]"
            return None

    return {name: number(value) for name, value in zip(fields, values)}


def _architectures() -> list[str] | None:
    """What the kernels were compiled for; None where the library does not say."""
    try:
        module = importlib.import_module("lowrank_kernels.cuda_library")
        return [str(name) for name in module.architectures()]
    except Exception:  # not built, or not loadable: the cases will say so
        return None


@functools.lru_cache(maxsize=1)
def facts() -> dict[str, object]:
    """The device and what its kernels depend on; nothing that names a host."""
    properties = torch.cuda.get_device_properties(0)
    driver = _query("driver_version")
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": driver and driver[0],
        "cuda": torch.version.cuda,
        "architectures": _architectures(),
        "plan": os.environ.get("LOWRANK_CUDA_PLAN"),
    }
