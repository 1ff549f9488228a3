"""The CUDA library's build: which architectures, errors of one line, and a wheel that holds what it says."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import setuptools

from lowrank_kernels import cuda_library
from wheels.binaries import fatbin_entries

ROOT = pathlib.Path(__file__).resolve().parents[1]

if not (ROOT / "setup.py").exists():
    pytest.skip("needs the source tree: no setup.py beside the tests", allow_module_level=True)


def load(path: str):
    """A fresh module from a file of the source tree."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build(monkeypatch):
    """setup.py, with nothing said in the environment."""
    for name in ("LOWRANK_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return load("setup.py")


@pytest.fixture
def toolkit(build, tmp_path, monkeypatch):
    """CUDA_HOME with an nvcc that knows compute capabilities up to 9.0 and variant a."""
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin/nvcc"
    nvcc.write_text('#!/bin/sh\ncase "$*" in *compute_1*|*f,code*) exit 1;; esac\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return str(nvcc)


def failure(call, *arguments) -> str:
    with pytest.raises(SystemExit) as error:
        call(*arguments)
    line = str(error.value)
    assert line.startswith("lowrank_kernels: ")
    assert "\n" not in line
    return line


# -- the list of architectures ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9.0a", ["9.0a"]),
        ("8.6+PTX", ["8.6+PTX"]),
        ("8.0 8.6;9.0a 12.0+PTX", ["8.0", "8.6", "9.0a", "12.0+PTX"]),
        (" 12.0;;8.0 ", ["8.0", "12.0"]),
        ("9.0a 9.0 9.0a", ["9.0", "9.0a"]),
        ("8.6 8.6+PTX 8.6", ["8.6+PTX"]),
        ("10.0f+PTX", ["10.0f+PTX"]),
    ],
)
def test_lists_are_read_as_torch_reads_them(build, text, expected):
    assert build.parse_architectures(text) == expected


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("8.0 Hopper", "Hopper"),
        ("90", "90"),
        ("9.0b", "9.0b"),
        ("8.6 +PTX", "+PTX"),
        ("8.6,9.0", "8.6,9.0"),
        ("8.6+ptx", "8.6+ptx"),
        (";", ""),
    ],
)
def test_an_entry_that_is_none_is_named(build, text, entry):
    assert failure(build.parse_architectures, text).endswith(f"got {entry!r}")


def test_an_entry_that_is_too_old_is_named(build):
    assert "need 8.0 or later, got '7.5'" in failure(build.parse_architectures, "8.0 7.5")


def test_default_list_is_cut_to_what_nvcc_knows(build, toolkit):
    # The newest plain one gets PTX: that of 9.0a would run on 9.0 alone.
    assert build.choose_architectures(toolkit, None) == ["8.0", "8.6", "8.9+PTX", "9.0a"]


def test_a_listed_entry_that_nvcc_does_not_know_is_an_error(build, toolkit):
    assert build.choose_architectures(toolkit, "8.0 9.0") == ["8.0", "9.0"]
    assert "cannot compile for '10.0'" in failure(build.choose_architectures, toolkit, "9.0 10.0")


def test_gencode(build):
    assert build.gencode("9.0a")[1] == "arch=compute_90a,code=sm_90a"
    assert build.gencode("12.0+PTX")[1] == "arch=compute_120,code=[sm_120,compute_120]"


# -- whether CUDA is built --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "listed", "torch_has_cuda", "built"),
    [
        ("", "", False, False),
        ("auto", "", False, False),
        ("auto", "", True, True),
        ("auto", "9.0a", False, True),
        ("0", "9.0a", True, False),
        ("1", "", False, True),
        ("1", "9.0a", True, True),
    ],
)
def test_choice(build, toolkit, monkeypatch, wanted, listed, torch_has_cuda, built):
    monkeypatch.setenv("LOWRANK_BUILD_CUDA", wanted)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    monkeypatch.setattr(build, "torch_has_cuda", lambda: torch_has_cuda)
    chosen, reason = build.cuda()
    assert (chosen is not None) == built == (reason is None)
    assert (build.CUDA_LIBRARY in build.product_names()) == built
    if built:
        assert chosen.nvcc == toolkit
        assert chosen.architectures[-1] == "9.0a"


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_no_nvcc(build, monkeypatch, variable):
    monkeypatch.setenv(variable, "/nonexistent")
    chosen, reason = build.cuda()
    assert chosen is None
    assert f"no nvcc ({variable} is /nonexistent" in reason
    build.cuda.cache_clear()
    monkeypatch.setenv("LOWRANK_BUILD_CUDA", "1")
    assert "set CUDA_HOME" in failure(build.cuda)


def test_a_wrong_choice_is_named(build, monkeypatch):
    monkeypatch.setenv("LOWRANK_BUILD_CUDA", "yes")
    assert "LOWRANK_BUILD_CUDA: expected 0, 1 or auto, got 'yes'" in failure(build.cuda)


@pytest.mark.parametrize(
    ("line", "cuda"),
    [
        ("cuda: Optional[str] = None", False),
        ("cuda: Optional[str] = '12.8'", True),
        ("cuda = '13.0'", True),
        ("cudart = '13.0'", False),
    ],
)
def test_torch_is_read_without_importing_it(build, monkeypatch, tmp_path, line, cuda):
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\nhip = None\n")
    monkeypatch.setattr(build, "torch_dir", lambda: tmp_path)
    assert build.torch_has_cuda() == cuda


# -- which GPUs a list covers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "runs_on", "not_on"),
    [
        ("8.0", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        ("8.6", [(8, 6), (8, 7), (8, 9)], [(8, 0), (9, 0)]),
        ("8.6+PTX", [(8, 6), (8, 9), (9, 0), (10, 3), (12, 1)], [(8, 0), (7, 5)]),
        ("9.0", [(9, 0)], [(8, 9), (10, 0)]),
        ("9.0a", [(9, 0)], [(8, 9), (10, 0), (12, 0)]),
        ("9.0a+PTX", [(9, 0)], [(10, 0), (12, 0)]),
        ("10.0a", [(10, 0)], [(10, 3), (12, 0)]),
        ("10.0f", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ("10.0f+PTX", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("10.3", [(10, 3)], [(10, 0)]),
        (
            "8.0 8.6 8.9 9.0a 10.0 12.0+PTX",
            [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (13, 0)],
            [(7, 5), (11, 0)],
        ),
        ("", [], [(8, 0)]),
    ],
)
def test_covers(listed, runs_on, not_on):
    architectures = listed.split()
    assert [c for c in runs_on if not cuda_library.covers(architectures, c)] == []
    assert [c for c in not_on if cuda_library.covers(architectures, c)] == []


def test_covers_takes_no_nonsense():
    with pytest.raises(ValueError, match="got 'sm_90'"):
        cuda_library.covers(["sm_90"], (9, 0))


@pytest.mark.parametrize(("capability", "entry"), [((9, 0), "9.0a"), ((12, 1), "12.1")])
def test_rebuild_hint(build, capability, entry):
    hint = cuda_library.rebuild_hint(capability)
    assert hint == (
        f'TORCH_CUDA_ARCH_LIST="{entry}" LOWRANK_BUILD_CUDA=1 pip install -e . --no-build-isolation'
    )
    assert build.parse_architectures(entry) == [entry]
    assert cuda_library.covers([entry], capability)


# -- the logs of ptxas -------------------------------------------------------------------------------

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4axpyILi128EEvPKfPfi' for 'sm_80'
ptxas info    : Function properties for _Z4axpyILi128EEvPKfPfi
    0 bytes stack frame, {spills} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 1 barriers, 512 bytes smem, 372 bytes cmem[0]
ptxas info    : Compiling entry function '_Z4axpyILi64EEvPKfPfi' for 'sm_90a'
ptxas info    : Function properties for _Z4axpyILi64EEvPKfPfi
    {stack} bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 1 barriers
"""


@pytest.mark.skipif(not shutil.which("c++filt"), reason="needs c++filt (binutils)")
@pytest.mark.parametrize(("spills", "stack", "bad"), [(0, 0, []), (4, 0, ["128"]), (0, 8, ["64"])])
def test_a_spill_is_found(tmp_path, capsys, spills, stack, bad):
    usage = load("csrc/cuda/check_usage.py")
    log = tmp_path / "axpy.o.log"
    log.write_text(LOG.format(spills=spills, stack=stack))
    assert usage.main([str(log)]) == bool(bad)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert [re.search(r"axpy<(\d+)>", line)[1] for line in lines if "SPILLS" in line] == bad
    usage.ALLOWED["axpy"] = "for this test"
    assert usage.main([str(log)]) == 0


def test_logs_without_kernels_are_no_success(tmp_path, capsys):
    (tmp_path / "empty.log").write_text("ptxas info    : 0 bytes gmem\n")
    assert load("csrc/cuda/check_usage.py").main([str(tmp_path / "empty.log")]) == 1


# -- a wheel for one architecture ---------------------------------------------------------------------

needs_nvcc = pytest.mark.skipif(
    load("setup.py").find_nvcc()[0] is None, reason="needs nvcc (CUDA_HOME, or on PATH)"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> pathlib.Path:
    """liblowrank_cuda.so out of a wheel built for 9.0a alone."""
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(folder)]
        + ["build", "--build-base", str(folder / "build")]
        + ["bdist_wheel", "--bdist-dir", str(folder / "bdist"), "--dist-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "LOWRANK_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0a"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lowrank_kernels: CUDA kernels for 9.0a\n" in done.stdout
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist() if name.endswith(".so")}
        assert names == {*load("setup.py").product_names(), "liblowrank_cuda.so"}
        return pathlib.Path(archive.extract("lowrank_kernels/liblowrank_cuda.so", folder))


@needs_nvcc
def test_the_binary_holds_what_the_library_says(library):
    loaded = ctypes.CDLL(str(library))  # without a driver, too: the CUDA runtime is inside
    for function in (loaded.lk_cuda_architectures, loaded.lk_cuda_build_info):
        function.restype = ctypes.c_char_p
    assert loaded.lk_cuda_architectures() == b"9.0a"
    assert re.search(rb"nvcc \d+\.\d+ for 9.0a$", loaded.lk_cuda_build_info())
    binaries = fatbin_entries(library.read_bytes())
    assert binaries
    assert [entries for entries in binaries if entries != {"sm_90a"}] == []


@needs_nvcc
@pytest.mark.skipif(not shutil.which("readelf"), reason="needs nm and readelf (binutils)")
def test_the_library_needs_neither_torch_nor_cudart_and_exports_only_its_own(library):
    def output(*command: str) -> str:
        return subprocess.run(
            [*command, str(library)], capture_output=True, text=True, check=True
        ).stdout

    dynamic = output("readelf", "--dynamic")
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    system = r"(libc|libm|libgcc_s|libstdc\+\+|libpthread|libdl|librt|ld-linux[\w-]*)\.so\.\d+"
    assert [name for name in needed if not re.fullmatch(system, name)] == []
    assert "[liblowrank_cuda.so]" in re.search(r"\(SONAME\).*", dynamic)[0]
    exported = output("nm", "-D", "--defined-only", "--format=posix")
    names = [line.split()[0] for line in exported.splitlines()]
    assert "lk_cuda_kernels" in names
    # Templates of the C++ standard library are weak and visible everywhere.
    assert [n for n in names if not n.startswith("lk_cuda_") and not re.match(r"_ZN?K?S", n)] == []


@needs_nvcc
def test_this_reader_of_fat_binaries_is_right(tmp_path):
    source = tmp_path / "kernel.cu"
    source.write_text("__global__ void kernel(float* x) { *x = 1; }\n")
    build = load("setup.py")
    nvcc = build.find_nvcc()[0]
    flags = [flag for entry in ("8.0", "9.0a", "9.0+PTX") for flag in build.gencode(entry)]
    target = tmp_path / "kernel.o"
    subprocess.run([nvcc, *flags, "-c", str(source), "-o", str(target)], check=True)
    assert fatbin_entries(target.read_bytes()) == [{"sm_80", "sm_90a", "sm_90", "compute_90"}]


@needs_nvcc
def test_cuobjdump_finds_the_same_code(library):
    triton = pytest.importorskip("triton", reason="triton brings a cuobjdump")
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this triton has no cuobjdump")
    listed = subprocess.run(
        [str(tool), "--list-elf", "--list-ptx", str(library)], capture_output=True, text=True
    ).stdout
    found = re.findall(r"\.(sm_\w+)\.(cubin|ptx)$", listed, re.MULTILINE)
    assert len(found) == len(fatbin_entries(library.read_bytes()))
    assert set(found) == {("sm_90a", "cubin")}


# -- a build without CUDA ---------------------------------------------------------------------------


def test_a_build_without_cuda_removes_an_older_library(build, tmp_path, monkeypatch):
    package = tmp_path / build.PACKAGE
    package.mkdir()
    (package / build.CUDA_LIBRARY).write_text("of an earlier build")
    monkeypatch.setenv("LOWRANK_BUILD_CUDA", "0")
    monkeypatch.setattr(build, "write_ninja_file", lambda *arguments: None)

    def run_ninja(program, folder):
        folder.mkdir(exist_ok=True)
        for name in build.product_names():
            (folder / name).write_text("new")

    monkeypatch.setattr(build, "run_ninja", run_ninja)
    command = build.NinjaBuild(setuptools.Distribution())
    command.build_temp, command.build_lib, command.inplace = str(tmp_path / "t"), str(tmp_path), 0
    command.editable_mode = False
    monkeypatch.chdir(tmp_path)
    command.run()
    assert sorted(p.name for p in package.iterdir()) == sorted(build.product_names())
    assert [pathlib.Path(path).name for path in command.get_outputs()] == build.product_names()
