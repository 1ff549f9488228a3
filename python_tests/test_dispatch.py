"""What runs is what was asked for, or an error says why not: instruction sets, backends, environment."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

import cases
import conftest
import lowrank_kernels as lk
from lowrank_kernels import backends, reference
from lowrank_kernels.schema import OPS, ops

needs_native = pytest.mark.skipif(
    conftest.ONLY_REFERENCE, reason="LOWRANK_BACKEND=reference: the native kernels are not tested"
)
PACKAGE = pathlib.Path(lk.__file__).parent


@pytest.fixture
def reference_calls(monkeypatch):
    """The names of the reference's operators, as they run."""
    calls = []

    def recorded(name, function):
        def run(*args):
            calls.append(name)
            return function(*args)

        return run

    for name in OPS:
        monkeypatch.setattr(reference, name, recorded(name, getattr(reference, name)))
    return calls


# -- instruction sets ------------------------------------------------------------------------------


@needs_native
def test_the_best_instruction_set_is_the_default():
    compiled = lk.backends.isas(compiled=True)
    assert lk.backends.isas() == [isa for isa in compiled if isa in lk.backends.isas()]
    assert lk.backends.isas()[-1] == compiled[-1] == "scalar"
    if not os.environ.get("LOWRANK_ISA"):
        assert lk.backends.isa() == lk.backends.isas()[0]


@needs_native
def test_use_isa_forces_and_restores():
    before = lk.backends.isa()
    for isa in lk.backends.isas():
        with lk.backends.use_isa(isa):
            assert lk.backends.isa() == isa == lk.backends.report()["isa"]
            with lk.backends.use_isa("scalar"):
                assert lk.backends.isa() == "scalar"
            assert lk.backends.isa() == isa
    with pytest.raises(ZeroDivisionError), lk.backends.use_isa("scalar"):
        _ = 1 / 0
    assert lk.backends.isa() == before


@needs_native
def test_another_instruction_set_is_other_code():
    """Another order of the sums shows in the last bits of some of 1000 of them.

    Of one row lanes of 1, 8 and 16 differ, of many rows tile registers from all others, and of bfloat16 numbers
    products of pairs from those of single ones.
    """
    x, *rest = cases.make("linear_4bit", cases.Case(64, 1000, 1024))
    results = {}
    for isa in lk.backends.isas():
        with lk.backends.use_isa(isa):
            some = (x[:1], x, x.bfloat16())
            results[isa] = torch.cat([ops.linear_4bit(rows, *rest).float() for rows in some])
    if len(results) == 1:
        pytest.skip(f"this CPU has kernels for {list(results)} alone: nothing to tell apart")
    for a in results:
        for b in results:
            assert a == b or not torch.equal(results[a], results[b]), f"{a} and {b}: the same bits"


@needs_native
@pytest.mark.parametrize("name", ["sse2", "AVX2", "avx-512", "scalar ", "0"])
def test_unknown_instruction_set(name):
    before = lk.backends.isa()
    with pytest.raises(ValueError) as error, lk.backends.use_isa(name):
        pytest.fail("the block must not run")
    for known in (*lk.backends.isas(), name):
        assert f"'{known}'" in str(error.value)
    assert lk.backends.isa() == before


@needs_native
def test_instruction_set_that_this_cpu_lacks():
    missing = [isa for isa in lk.backends.isas(compiled=True) if isa not in lk.backends.isas()]
    if not missing:
        pytest.skip("this CPU supports every instruction set that was compiled")
    with pytest.raises(ValueError, match="this CPU supports"), lk.backends.use_isa(missing[0]):
        pytest.fail("the block must not run")


@needs_native
def test_every_instruction_set_is_tested_here():
    """AMX where it is missing: test_emulated_amx.py."""
    missing = [isa for isa in lk.backends.isas(compiled=True) if isa not in lk.backends.isas()]
    if missing:
        pytest.skip(f"this CPU has no {' and no '.join(missing)}: no test ran those kernels")


# -- backends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_the_reference_runs_when_asked_for(op, reference_calls):
    args = cases.make(op, cases.Case())
    with lk.backends.use("reference"):
        assert lk.backends.active() == "reference"
        getattr(ops, op)(*args)
    assert op in reference_calls


@pytest.mark.parametrize("op", OPS)
def test_the_native_kernels_never_run_the_reference(op, backend, reference_calls):
    """No silent fallback, whatever the case."""
    if conftest.ONLY_REFERENCE:
        pytest.skip("LOWRANK_BACKEND=reference: the native kernels are not tested")
    for case in (*cases.FEW, cases.Case(M=0), cases.Case(M=1, N=1, K=1)):
        getattr(ops, op)(*cases.make(op, case))
    assert reference_calls == []


@needs_native
def test_use_nests_and_restores(reference_calls):
    args = cases.make("linear_4bit", cases.Case())

    def runs_reference():
        reference_calls.clear()
        ops.linear_4bit(*args)
        return bool(reference_calls)

    use = lk.backends.use
    assert not runs_reference()
    with use("reference"):
        assert runs_reference()
        with use("reference"):
            assert runs_reference()
        assert runs_reference()
        with use("cpu"):
            assert lk.backends.active() == "cpu" and not runs_reference()
        assert lk.backends.active() == "reference" and runs_reference()
    with pytest.raises(ZeroDivisionError), use("reference"):
        _ = 1 / 0
    assert lk.backends.active() == "cpu" and not runs_reference()


@pytest.mark.parametrize("name", ["gpu", "CPU", "", None, 0, "cpu-avx2"])
def test_unknown_backend(name):
    with pytest.raises(ValueError) as error, lk.backends.use(name):
        pytest.fail("the block must not run")
    for known in ("cpu", "cuda", "triton", "reference", "emulator"):
        assert repr(known) in str(error.value)
    assert repr(name) in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about a machine without CUDA")
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_backend_that_is_not_here(name, monkeypatch):
    monkeypatch.setattr(backends.triton_kernels, "installed", lambda: False)
    with pytest.raises(RuntimeError) as error, lk.backends.use(name):
        pytest.fail("the block must not run")
    assert f"backend '{name}' is not available" in str(error.value)
    commands = {
        "cuda": "build: pip install -e . --no-build-isolation",
        "triton": "install: pip install 'triton>=3.6'",
    }
    assert commands[name] in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about a machine without CUDA")
@pytest.mark.parametrize("op", OPS)
def test_cuda_tensors_get_an_error_that_says_so(op, reference_calls):
    """What the dispatcher would call for a CUDA tensor, called with CPU tensors for want of others."""
    if conftest.ONLY_REFERENCE:
        pytest.skip("LOWRANK_BACKEND=reference: the reference serves CUDA tensors as well")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match=r"lowrank_kernels has no CUDA kernels: .*without CUDA"):
        getattr(ops, op).default.redispatch(keys, *cases.make(op, cases.Case()))
    assert reference_calls == []


def test_report():
    report = lk.backends.report()
    assert report["active"] == lk.backends.active() and "reference" in report["available"]
    assert report["threads"] == torch.get_num_threads() and report["torch"] == torch.__version__
    native = "cpu" in report["available"]
    assert report["isas_supported"] == (lk.backends.isas() if native else [])
    assert isinstance(report["build"], str) and report["build"]
    assert (report["cuda"] == "not built") == ("cuda" not in report["available"])


# -- triton ----------------------------------------------------------------------------------------


def test_triton_is_not_imported_before_it_is_used():
    program = "import sys, lowrank_kernels; print('triton' in sys.modules)"
    assert python({}, program) == (0, "False", "")
    assert python({"TRITON_INTERPRET": "1", "LOWRANK_BACKEND": "triton"}, program)[:2] == (
        0,
        "False",
    )


# A GPU build of torch, as far as the package sees before a GPU is used.
GPU_BUILD = "import torch; torch.version.cuda = '13.0'; "
REDISPATCH = (
    "w = lk.quantize_4bit(torch.ones(2, 64)); keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA); "
    "lk.schema.ops.linear_4bit.default.redispatch(keys, torch.ones(1, 64), *w.op_args(), None)"
)


@needs_native
@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about a machine without CUDA")
def test_triton_serves_the_gpus_where_the_cuda_library_was_not_built():
    pytest.importorskip("triton", reason="triton is not installed")
    program = GPU_BUILD + "import lowrank_kernels as lk; print(lk.backends.report()['triton']); "
    status, output, errors = python({}, program + REDISPATCH)
    assert output.endswith(", serves the GPUs")
    assert status == 1 and "active drivers" in errors  # it was Triton that looked for a GPU
    # Asked for by name, the CUDA library answers for itself.
    status, _, errors = python({"LOWRANK_BACKEND": "cuda"}, program + REDISPATCH)
    assert status == 1 and "backend 'cuda' is not available" in errors


@needs_native
@pytest.mark.parametrize(
    ("compiled", "serves"),
    [
        (("9.0a",), False),
        (("8.0", "9.0a"), False),
        (("8.0",), True),
        (("8.0+PTX",), False),
        ((), True),
    ],
)
def test_triton_serves_gpus_that_the_library_has_no_code_for(compiled, serves, monkeypatch):
    monkeypatch.setattr(backends.cuda_library, "architectures", lambda: compiled)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    capabilities = [(8, 0), (9, 0)] if "8.0" in compiled else [(9, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    monkeypatch.setattr(backends, "_triton_serves_gpus", False)
    monkeypatch.setattr(backends, "_activate", lambda name: None)
    backends._choose_for_gpus()
    assert backends._triton_serves_gpus == serves


def test_use_triton_in_an_interpreter_process():
    pytest.importorskip("triton", reason="triton is not installed")
    program = SHOW.replace(
        "lk.linear_4bit(", "[lk.backends._activate('triton'), lk.linear_4bit("
    ).replace("64))); ", "64)))]; ", 1)
    assert python({"TRITON_INTERPRET": "1"}, program)[:2] == (
        0,
        f"triton 0 {lk.backends.isas()[0]}",
    )


# -- environment -----------------------------------------------------------------------------------

SHOW = (
    "import lowrank_kernels as lk, torch; from lowrank_kernels import reference; "
    "calls = []; f = reference.linear_4bit; "
    "reference.linear_4bit = lambda *a: (calls.append(1), f(*a))[1]; "
    "lk.linear_4bit(torch.ones(1, 64), lk.quantize_4bit(torch.ones(2, 64))); "
    "print(lk.backends.active(), len(calls), lk.backends.report()['isa'])"
)


def python(environment, program=SHOW, root=PACKAGE.parent):
    """Runs a program in a new process; (exit status, last line of output, last line of errors)."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("LOWRANK_")}
    path = os.pathsep.join([str(root), *filter(None, [inherited.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,  # which comes first in the path of a program given with -c
        env=inherited | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    last = [(stream.strip().splitlines() or [""])[-1] for stream in (result.stdout, result.stderr)]
    return result.returncode, *last


@needs_native
@pytest.mark.parametrize("isa", ["scalar", "avx2", "neon"])
def test_isa_from_the_environment(isa):
    if isa not in lk.backends.isas():
        pytest.skip(f"this CPU has no kernels for {isa}, only {lk.backends.isas()}")
    assert python({"LOWRANK_ISA": isa}) == (0, f"cpu 0 {isa}", "")


def test_reference_from_the_environment():
    status, output, errors = python({"LOWRANK_BACKEND": "reference"})
    assert (status, errors) == (0, "") and output.startswith("reference 1 ")


@needs_native
def test_empty_environment_is_no_choice():
    empty = {"LOWRANK_ISA": "", "LOWRANK_BACKEND": ""}
    assert python(empty) == (0, f"cpu 0 {lk.backends.isas()[0]}", "")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"LOWRANK_BACKEND": "gpu"}, ("ValueError: backend: expected one of", "'cuda'", "'gpu'")),
        ({"LOWRANK_BACKEND": "cuda"}, ("RuntimeError: backend 'cuda' is not available", "build:")),
        pytest.param(
            {"LOWRANK_ISA": "sse9"}, ("ValueError", "'scalar'", "'sse9'"), marks=needs_native
        ),
    ],
)
def test_bad_environment_fails_at_import(environment, words):
    if "cuda" in environment.values() and torch.cuda.is_available():
        pytest.skip("this is about a machine without CUDA")
    status, output, errors = python(environment)
    assert status == 1 and output == ""
    assert all(word in errors for word in words), errors


def test_without_the_library_every_op_says_how_to_build_it(tmp_path):
    """The package as it is before a build: it imports, and only the reference runs, on request."""
    without = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=without)
    status, output, errors = python({}, root=tmp_path)
    assert status == 1 and output == ""
    assert errors.startswith("RuntimeError: lowrank_kernels has no CPU kernels: ")
    assert errors.endswith("; build: pip install -e . --no-build-isolation")
    status, output, _ = python({"LOWRANK_BACKEND": "reference"}, root=tmp_path)
    assert (status, output) == (0, "reference 1 None")
