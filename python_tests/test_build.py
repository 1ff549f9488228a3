"""The build: one version everywhere, errors of one line, only the dependencies that are meant."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import lowrank_kernels
from wheels.binaries import needed_libraries, undefined_symbols, unstable_symbols

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(lowrank_kernels.__file__).parent

needs_sources = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="needs the source tree: no setup.py beside the tests"
)
needs_nm = pytest.mark.skipif(not shutil.which("nm"), reason="needs nm and readelf (binutils)")


def read(name):
    return (ROOT / name).read_text()


# ---- Versions ----


def test_version_is_the_same_in_package_and_metadata():
    assert lowrank_kernels.__version__ == importlib.metadata.version("lowrank_kernels")


@needs_sources
def test_version_is_the_same_in_sources_and_changelog():
    version = re.search(r'^version = "(.+)"$', read("pyproject.toml"), re.MULTILINE)[1]
    assert version == importlib.metadata.version("lowrank_kernels")
    newest = re.search(r"^## \[(.+?)\]", read("CHANGELOG.md"), re.MULTILINE)[1]
    assert version == newest


def test_metadata_asks_for_the_torch_whose_abi_is_targeted():
    requires = importlib.metadata.requires("lowrank_kernels")
    assert "torch>=2.10" in requires
    assert {"numpy", "safetensors", "tqdm"} <= set(requires)


@needs_sources
def test_pins_agree():
    build_pins = re.search(r"^requires = \[(.+)\]$", read("pyproject.toml"), re.MULTILINE)[1]
    installed = read("requirements/base.txt").splitlines()
    for pin in re.findall(r'"(.+?)"', build_pins):
        assert pin in installed, f"{pin} is not in requirements/base.txt"
    hooks = read(".pre-commit-config.yaml")
    for pin in re.findall(r"^\S+==\S+$", read("requirements/lint.txt"), re.MULTILINE):
        assert pin in hooks, f"{pin} is not in .pre-commit-config.yaml"


# ---- Errors of setup.py: one line, exit code 1, no traceback ----

# Runs setup.py as if the module named first could not be found.
WITHOUT = """
import runpy, sys
sys.modules[sys.argv.pop(1)] = None
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
"""


def build_error(tmp_path, *, cxx=None, without=None):
    start = ["-c", WITHOUT, without] if without else ["setup.py"]
    folders = ["--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib")]
    environment = {**os.environ, "CXX": cxx} if cxx else os.environ
    result = subprocess.run(
        [sys.executable, *start, "build_ext", *folders],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1, result
    assert "Traceback" not in result.stdout + result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("lowrank_kernels: ")
    return lines[0]


@needs_sources
@pytest.mark.parametrize("cxx", ["/nonexistent", "/nonexistent/g++ -m64", "false"])
def test_a_missing_or_broken_compiler_is_named_in_one_line(tmp_path, cxx):
    line = build_error(tmp_path, cxx=cxx)
    assert f"(tried {cxx})" in line
    assert "install g++" in line


@needs_sources
@pytest.mark.parametrize(
    ("module", "install"),
    [("torch", "pip install 'torch>=2.10'"), ("ninja", "pip install ninja")]
    + [("pybind11", "pip install pybind11")],
)
def test_a_missing_package_is_named_in_one_line(tmp_path, module, install):
    assert install in build_error(tmp_path, without=module)


# ---- Flags, and what tools read of the build ----


@needs_sources
def test_the_flags_of_all_compilations_have_one_file():
    common = shlex.split(read("csrc/flags"), comments=True)
    assert "-ffp-contract=off" in common
    for name in ("setup.py", "Makefile"):
        text = read(name)
        assert "csrc/flags" in text
        # (setup.py's probe of the compiler names the standard.)
        spelt = [flag for flag in common if not flag.startswith(("-std", "-I")) and flag in text]
        assert spelt == [], name


@needs_sources
def test_the_build_writes_compile_commands(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    product = build.Product("lib.so", ["csrc/cpu/a.cpp"], cflags=["-DONE=1"])
    monkeypatch.chdir(tmp_path)
    build.write_ninja_file(tmp_path / "build.ninja", ["c++"], [product], None)
    build.write_compile_commands(build.ninja(), tmp_path)
    (entry,) = json.loads(Path("compile_commands.json").read_text())
    assert entry["file"] == "csrc/cpu/a.cpp" and entry["directory"] == str(tmp_path)
    assert {"-ffp-contract=off", "-DONE=1", "-O3"} <= set(entry["command"].split())


# ---- What the products depend on ----


@needs_nm
def test_ops_use_only_the_stable_abi():
    assert unstable_symbols(PACKAGE / "_ops.so") == set()
    symbols = undefined_symbols(PACKAGE / "_ops.so")
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in symbols)
    assert not any(name.startswith(("Py", "_Py")) for name in symbols)
    needed = needed_libraries(PACKAGE / "_ops.so")
    assert needed <= {"liblowrank_cpu.so", "libtorch_cpu.so", "libtorch.so"}


@needs_nm
def test_kernels_know_neither_torch_nor_python():
    symbols = undefined_symbols(PACKAGE / "liblowrank_cpu.so")
    pattern = re.compile(r"torch|c10|caffe2|_ZN?K?2at|^_?Py")
    assert not {name for name in symbols if pattern.search(name)}
    assert needed_libraries(PACKAGE / "liblowrank_cpu.so") == set()


@needs_nm
def test_host_module_knows_only_the_kernel_library():
    host = "_host" + sysconfig.get_config_var("EXT_SUFFIX")
    assert needed_libraries(PACKAGE / host) == {"liblowrank_cpu.so"}


@needs_sources
@pytest.mark.parametrize("name", ["csrc/flags", "setup.py", "Makefile"])
def test_no_global_isa_flags(name):
    flags = re.findall(r"(?<![\w-])-[a-zA-Z][\w=+-]*", read(name))
    assert flags
    forbidden = re.compile(r"-m\w|-ffast-math|-Ofast|-funsafe-math")
    assert not [flag for flag in flags if forbidden.match(flag)]
