"""Which implementation runs each operator: load the native libraries once, choose, force, report.

========== ============= ==============================================================================
backend    device        implementation
========== ============= ==============================================================================
cpu        CPU           C++ kernels in ``liblowrank_cpu.so``, one set per instruction set, bound by ``_ops.so``
cuda       CUDA          CUDA kernels in ``liblowrank_cuda.so``, opened by ``_ops.so`` at the first call
triton     CUDA          Triton kernels (``triton/``); CPU in a process with ``TRITON_INTERPRET=1``: for tests
reference  CPU, CUDA     float64 PyTorch (``reference.py``): slow, for checking
emulator   CPU           the CUDA kernels, run thread by thread on the CPU: for tests (``LOWRANK_EMULATOR``)
========== ============= ==============================================================================

Where the CUDA library was not built, or lacks code for a GPU of this machine, Triton serves the GPUs if it is
installed; :func:`report` says so. ``LOWRANK_BACKEND`` and ``LOWRANK_ISA`` force a choice at import. Nothing ever
falls back in silence: a device without kernels raises an error that names the build command.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import pathlib
import threading
import warnings
from collections.abc import Callable, Iterator

import torch

from . import cuda_library, reference
from . import triton as triton_kernels
from .schema import NAMESPACE, OPS

_PACKAGE = pathlib.Path(__file__).parent
_BUILD_COMMAND = "pip install -e . --no-build-isolation"
# backend -> the dispatch keys it serves
_KEYS = {
    "cpu": ("CPU",),
    "cuda": ("CUDA",),
    "triton": ("CPU",) if triton_kernels.interpreted() else ("CUDA",),
    "reference": ("CPU", "CUDA"),
    "emulator": ("CPU",),
}
EMULATED = f"{NAMESPACE}_emulated"  # the namespace of the emulator's operators

_native_error: str | None = None
_held: list[torch.library.Library] = []  # a registration lives as long as its Library object


def _load_native() -> None:
    """Loads ``_ops.so`` (registers the CPU kernels) and ``_host``; remembers why when they cannot be loaded."""
    global _native_error, _host
    try:
        torch.ops.load_library(_PACKAGE / "_ops.so")
        from . import _host
    except (OSError, ImportError) as error:
        _native_error = str(error).strip().splitlines()[-1]
        _host = None


def _missing(device: str, reason: str):
    def fail(*args, **kwargs):
        raise RuntimeError(f"lowrank_kernels has no {device} kernels: {reason}")

    return fail


def _register_missing(key: str, reason: str) -> None:
    library = torch.library.Library(NAMESPACE, "IMPL")
    for name in OPS:
        library.impl(name, _missing(key, reason), key)
    _held.append(library)


def _reference_kernel(name: str):
    """The reference in the dtypes of the operator's schema; unrounded float64 is for tests only."""

    def run(*args):
        likes = OPS[name].fake(*args)  # refuses what the kernels refuse
        outputs = getattr(reference, name)(*args)
        if name.endswith("_"):  # what the first argument becomes is the first output
            args[0].copy_(outputs[0])
            outputs = outputs[1] if len(outputs) == 2 else outputs[1:]
        return _rounded(outputs, likes)

    return run


def _rounded(outputs, likes):
    """The outputs of an operator, lists among them, in the dtypes of ``likes``."""
    if isinstance(outputs, torch.Tensor):
        return outputs.to(likes.dtype).contiguous()
    return type(outputs)([_rounded(o, like) for o, like in zip(outputs, likes, strict=True)])


def _available() -> tuple[str, ...]:
    names = ["reference"]
    if _native_error is None:
        names.append("cpu")
        if (_PACKAGE / "liblowrank_cuda.so").exists():
            names.append("cuda")
        if os.path.exists(os.environ.get("LOWRANK_EMULATOR", "")):
            names.append("emulator")
    if triton_kernels.installed() and (_GPU_BUILD or triton_kernels.interpreted()):
        names.append("triton")
    return tuple(sorted(names))


_GPU_BUILD = torch.version.cuda is not None or torch.version.hip is not None
_triton_serves_gpus = False  # when nothing else was asked for


def _choose_for_gpus() -> None:
    """Hands the GPUs to Triton if there is one that the CUDA library has no code for."""
    global _triton_serves_gpus
    try:
        compiled = cuda_library.architectures()
    except OSError:  # the library says itself what is wrong with it
        return
    _triton_serves_gpus = not compiled or not all(
        cuda_library.covers(compiled, torch.cuda.get_device_capability(i))
        for i in range(torch.cuda.device_count())
    )
    if _triton_serves_gpus and _active == "cpu":
        _activate("cpu")


class _Setting:
    """A setting of the whole process that blocks of code ask for: the latest request still in force counts.

    Blocks may overlap in any order (threads, asyncio tasks, generators): one that ends takes back its own request
    and no other. Where none is left, the setting is as it was before the first.
    """

    def __init__(self, put: Callable[[str], None], current: Callable[[], str]) -> None:
        self._put, self._current = put, current
        self._requests: list[list[str]] = []  # each a list of its own, to be told apart
        self._before = ""
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def asked(self, value: str) -> Iterator[None]:
        """Within the block the setting is ``value``, unless a later request is in force."""
        request = [value]
        with self._lock:
            before = self._current()
            self._put(value)
            if not self._requests:
                self._before = before
            self._requests.append(request)
        try:
            yield
        finally:
            with self._lock:
                self._requests = [other for other in self._requests if other is not request]
                self._put(self._requests[-1][0] if self._requests else self._before)


_active = "cpu"
_override: torch.library.Library | None = None  # what stands above the native kernels, if anything


def _activate(backend: str) -> None:
    global _active, _override
    if _override is not None:
        _override._destroy()
        _override = None
    if backend == "reference":
        _override = _register_over(backend, _reference_kernel)
    elif backend == "triton" or (backend == "cpu" and _triton_serves_gpus):
        _override = _register_over("triton", triton_kernels.kernel_of)
    elif backend == "emulator":
        _define_emulated()
        _override = _register_over(
            backend, lambda name: getattr(getattr(torch.ops, EMULATED), name)
        )
    _active = backend


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Within the block, operators on the devices that ``backend`` serves run on it (see the table above).

    It holds for the whole process, not per thread. Blocks may overlap in any order: the one that was entered last
    and has not ended counts. Raises ValueError for an unknown name and RuntimeError for a backend that was not
    built, naming the build command.
    """
    _check_backend(backend)
    with _backend.asked(backend):
        yield


def _check_backend(backend: object) -> None:
    if backend not in _KEYS:
        raise ValueError(f"backend: expected one of {tuple(_KEYS)}, got {backend!r}")
    if backend in _available():
        return
    reason = f"{_native_error or 'not built into this installation'}; build: {_BUILD_COMMAND}"
    if backend == "triton":
        reason = "torch is a CPU build (TRITON_INTERPRET=1 runs it there, for tests)"
        if not triton_kernels.installed():
            reason = f"it is not installed; install: {triton_kernels.INSTALL_COMMAND}"
    raise RuntimeError(f"backend {backend!r} is not available: {reason}")


def _register_over(backend: str, kernel_of: Callable[[str], Callable]) -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*other operators may also be overridden")
        for name in OPS:
            for key in _KEYS[backend]:
                library.impl(name, kernel_of(name), key, allow_override=True)
    return library


@functools.cache
def _define_emulated() -> None:
    """The schemas of the emulator's operators; ``_ops.so`` has implemented them already."""
    library = torch.library.Library(EMULATED, "DEF")
    for name, op in OPS.items():
        library.define(name + op.schema)
    _held.append(library)


_backend = _Setting(_activate, lambda: _active)


def active() -> str:
    """The backend in force; "cpu" stands for the best kernels of each device."""
    return _active


def triton_serves_gpus() -> bool:
    """Whether operators on GPUs run on Triton: asked for, or because the CUDA library has no code for one of them.

    Known once torch has started CUDA.
    """
    asked = _active == "triton" and "CUDA" in _KEYS["triton"]
    return asked or (_active == "cpu" and _triton_serves_gpus)


def _triton_report() -> str:
    """The version of triton, and whether it stands in for the CUDA library."""
    if not triton_kernels.installed():
        return "not installed"
    serves = ", serves the GPUs" if triton_serves_gpus() else ""
    return importlib.metadata.version("triton") + serves


def host_module():
    """The pybind11 module ``_host``. Raises RuntimeError, naming the build command, if it was not built."""
    if _host is None:
        raise RuntimeError(
            f"lowrank_kernels was not built: {_native_error}; build: {_BUILD_COMMAND}"
        )
    return _host


def isa() -> str:
    """The instruction set whose CPU kernels run now, one of :func:`isas`."""
    return host_module().isa_active()


def isas(compiled: bool = False) -> list[str]:
    """The instruction sets this CPU supports, best first; with ``compiled`` all that the library has kernels for."""
    return host_module().isa_names() if compiled else host_module().isa_supported()


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Within the block CPU kernels run on this instruction set. Also ``LOWRANK_ISA``.

    It holds for the whole process, and blocks may overlap, as those of :func:`use`. Raises ValueError if ``name``
    is unknown or this CPU does not support it.
    """
    host_module()
    with _isa.asked(name):
        yield


_isa = _Setting(lambda name: host_module().isa_set(name), isa)


# The names that use_kernel() took before, accepted for one release.
_OLD_KERNELS = {"few": "gemv", "small": "skinny", "panels": "gemm", "tiles": "amx"}


def kernels(dtype: torch.dtype = torch.float32) -> dict[str, dict[str, tuple[int, int | None]]]:
    """For how many rows each CPU kernel is the fastest one, as measured: {"forward": ..., "dx": ...}.

    Each is {kernel: (first, last)} in rows of x or dy of this dtype, for the instruction set in use; last is None where
    there is none. (Not measured but counted: from how many bfloat16 rows on ``amx`` is.) They are::

        gemv    rows of the weight decoded in registers, for a dot or an outer product
        skinny  16 rows of the weight decoded in registers, for all rows of x
        gemm    decoded into packed panels of float32
        amx     tile registers of bfloat16 (AMX), float32 numbers as sums of three, bfloat16 ones as they are

    A weight whose blocks do not fit its rows, and a dense one, have no ``gemv`` and ``skinny``: ``gemm`` serves
    them.
    """
    ranges = {}
    crossovers = host_module().crossovers(products(dtype) == torch.bfloat16)
    for name, (gemv, skinny, amx) in zip(("forward", "dx"), crossovers, strict=True):
        of = {"gemv": (1, gemv)}
        if skinny > gemv:
            of["skinny"] = (gemv + 1, min(skinny, amx - 1))
        first = max(gemv, skinny) + 1
        if first < amx:
            of["gemm"] = (first, amx - 1 if amx < 2**62 else None)
        if amx < 2**62:
            of["amx"] = (amx, None)
        ranges[name] = of
    return ranges


@contextlib.contextmanager
def use_kernel(name: str) -> Iterator[None]:
    """Within the block the product with the frozen base runs on this CPU kernel. For tuning.

    It holds for the whole process, and blocks may overlap, as those of :func:`use`. ``name`` is one of
    :data:`KERNELS`; what it cannot compute (see :func:`kernels`; ``gemv`` takes 4 rows, ``skinny`` as many as shown
    there) runs on ``gemm``. Under :func:`int8_activations` it says whether tile registers multiply, where there are any
    for bytes; the bits are the same. Raises ValueError if ``name`` is unknown, or the instruction set in use has no
    such kernel. The names "few", "small", "panels" and "tiles" of earlier versions are accepted with a
    DeprecationWarning.
    """
    if name in _OLD_KERNELS:
        new = _OLD_KERNELS[name]
        message = f"name: the kernel {name!r} is called {new!r} now"
        warnings.warn(message, DeprecationWarning, stacklevel=3)  # past contextlib's __enter__
        name = new
    if name not in KERNELS:
        raise ValueError(f"name: expected one of {KERNELS}, got {name!r}")
    if name == "amx" and "amx" not in kernels()["forward"]:
        raise ValueError(f"name: the instruction set in use, {isa()!r}, has no kernel 'amx'")
    with _forced_kernel.asked(name):
        yield


kernel_in_force = ""  # as the native library has it; torch.compile guards on this one


def _force_kernel(name: str) -> None:
    global kernel_in_force
    host_module().kernel_set(name)
    kernel_in_force = name


_forced_kernel = _Setting(_force_kernel, lambda: kernel_in_force)


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Within the block the CPU multiplies every activation by 4-bit weights exactly: in float32, none rounded.

    Elsewhere that holds for float32 and float16 activations; the operands of bfloat16 ones are rounded once to
    bfloat16 where the instruction set has products of bfloat16 numbers ("avx512_bf16", "amx", "neon_bf16"), as on GPUs:
    in forward the codes of the weight, whose sums are scaled in float32, in backward the decoded weight, or codes and
    scaled gradients. That takes half of the time or less, and::

        |y - exact| <= 2^-8 Σ_k |x_k W_nk|,   beside the rounding of y itself

    ``torch.set_float32_matmul_precision("medium")``, torch's own switch, permits the same for float32 activations.
    See :func:`products` for what is in force. Adapters and their gradients, and dx of up to four rows, are exact with
    or without it. Subnormal numbers count as zero where operands are rounded.

    It holds for the whole process, and blocks may overlap, as those of :func:`use`.

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> w = lk.quantize_4bit(torch.randn(32, 64))
        >>> with lk.backends.exact():
        ...     y = lk.linear_4bit(torch.randn(2, 64, dtype=torch.bfloat16), w)
    """
    host_module()
    with _exact.asked("exact"):
        yield


def products(dtype: torch.dtype) -> torch.dtype:
    """In which dtype the CPU multiplies activations of ``dtype`` by 4-bit weights now: torch.float32 or torch.bfloat16.

    Sums are float32 in any case. What decides are the instruction set, :func:`exact`, and for torch.float32
    ``torch.backends.mkldnn.matmul.fp32_precision``, which ``torch.set_float32_matmul_precision`` sets.
    (:func:`int8_activations` comes before all of them.)

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> with lk.backends.exact():
        ...     lk.backends.products(torch.bfloat16)
        torch.float32
    """
    rounded = dtype == torch.bfloat16 or (
        dtype == torch.float32 and torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    )
    rounded = rounded and host_module().pairs() and not host_module().exact()
    return torch.bfloat16 if rounded else torch.float32


_exact = _Setting(
    lambda value: host_module().exact_set(bool(value)),
    lambda: "exact" if host_module().exact() else "",
)


@contextlib.contextmanager
def batch_invariant() -> Iterator[None]:
    """Within the block, or the function it decorates, a row's bits on the CPU are the same in every batch.

    y and dx of a row then depend on that row, the weight and its adapter alone, whatever the number of rows: the
    same prompt gives the same tokens alone and among others. Otherwise this holds within one kernel (see
    :func:`kernels`): a row alone, in a batch of 5, or in one of 100 may differ in its last bits. It holds for the
    whole process; blocks may overlap in any order, and it is in force until the last of them has ended.

    Costs what the kernels ``gemv`` and ``amx`` save: docs/performance.md. With
    :func:`int8_activations` rows are independent anyway, at no cost.

    Raises RuntimeError where a layer runs on a tensor that is not on the CPU, or on another backend than "cpu".

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> w = lk.quantize_4bit(torch.randn(32, 64))
        >>> x = torch.randn(7, 64)
        >>> with lk.batch_invariant():
        ...     torch.equal(lk.linear_4bit(x, w)[:1], lk.linear_4bit(x[:1], w))
        True
    """
    with _forced_kernel.asked("invariant"):
        yield


def check_cpu_kernels(feature: str, x: torch.Tensor) -> None:
    """Raises RuntimeError if x would not meet the CPU kernels, which alone have ``feature``."""
    if x.is_meta:
        return
    if x.device.type != "cpu":
        raise RuntimeError(f"{feature}: expected x on the CPU, got it on {x.device}")
    if _active not in ("cpu", "cuda"):  # "cuda" leaves the CPU's kernels where they are
        raise RuntimeError(f"{feature}: expected the backend 'cpu', got {_active!r}")


def _cuda_build() -> str:
    """Compiler and architectures of the CUDA library; no GPU is touched."""
    try:
        return cuda_library.build_info() or "not built"
    except OSError as error:
        return f"cannot be opened: {error}"


def report() -> dict[str, object]:
    """What would run here: active backend, backends found, ISA in use, ISAs supported, threads, builds.

    "kernels": which CPU kernel serves which numbers of rows, see :func:`kernels`; "kernel": the one that was
    asked for instead, or None. "int8": what :func:`int8_activations` would run on, "amx_int8" (few rows on
    "avx512_vnni"), "avx512_vnni", "avx_vnni", "neon_dotprod" or None.
    """
    native = _host is not None
    return {
        "active": _active,
        "available": list(_available()),
        "isa": isa() if native else None,
        "isas_supported": isas() if native else [],
        "kernels": kernels() if native else None,
        "kernel": kernel_in_force or None,
        "int8": _host.int8_kernels() if native else None,
        "threads": torch.get_num_threads(),
        "build": _host.build_info() if native else f"not built: {_native_error}",
        "cuda": _cuda_build(),
        "triton": _triton_report(),
        "torch": torch.__version__,
    }


_load_native()
# The CPU kernels of the product with the frozen base, as the native library names them.
KERNELS: tuple[str, ...] = tuple(_host.kernel_names()) if _host is not None else ()
if _native_error is not None:
    for _key in ("CPU", "CUDA"):
        _register_missing(_key, f"{_native_error}; build: {_BUILD_COMMAND}")

if _GPU_BUILD and triton_kernels.installed() and not triton_kernels.interpreted():
    if cuda_library.path().exists():
        torch.cuda._lazy_call(_choose_for_gpus)  # capabilities are known when torch starts CUDA
    else:
        _choose_for_gpus()

if os.environ.get("LOWRANK_ISA"):
    host_module().isa_set(os.environ["LOWRANK_ISA"])
if os.environ.get("LOWRANK_BACKEND"):
    _check_backend(os.environ["LOWRANK_BACKEND"])
    _activate(os.environ["LOWRANK_BACKEND"])
