"""Builds the native parts: shared objects inside the package folder, made by one ninja run.

    liblowrank_cpu.so    csrc/cpu, csrc/cpu/isa   the kernels; no torch, no Python
    _ops.so              csrc/ops                 torch ops on the LibTorch stable ABI; no Python
    _host.<suffix>.so    csrc/host                pybind11 module: ISA and build introspection

Environment: CXX chooses the compiler, MAX_JOBS the number of parallel compilations.
"""

import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGE = "lowrank_kernels"
MIN_TORCH = (2, 10)
# No -m flag here, ever: each file in csrc/cpu/isa selects its instruction set by pragma, so
# that nothing else in the library can need more than the baseline CPU. -ffp-contract=off because
# a fused multiply-add must be one we wrote: results have to be the same for every compiler.
CXXFLAGS = shlex.split(
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno"
    " -Wall -Wextra -Icsrc"
)
LDFLAGS = ["-shared", "-Wl,-rpath,$ORIGIN", "-Wl,--as-needed"]


def fail(message):
    sys.exit(f"{PACKAGE}: {message}")  # one line on stderr, exit code 1


class Product(NamedTuple):
    """One shared object: what it is compiled from, and what it is linked to."""

    name: str
    sources: list[str]
    cflags: list[str] = []
    ldflags: list[str] = []
    needs: list[str] = []  # other products


def host_name():
    return "_host" + sysconfig.get_config_var("EXT_SUFFIX")


def product_names():
    return ["liblowrank_cpu.so", "_ops.so", host_name()]


def products():
    """What is built. (The CUDA launchers will be one more, with an nvcc rule of its own.)"""
    kernels = {*glob("csrc/cpu/*.cpp"), *glob("csrc/cpu/isa/*.cpp")} - {"csrc/cpu/selftest.cpp"}
    torch = torch_dir()
    return [
        Product(
            "liblowrank_cpu.so",
            sorted(kernels),
            ldflags=["-Wl,--no-undefined", "-Wl,-soname,liblowrank_cpu.so"],
        ),
        Product(
            "_ops.so",
            sorted(glob("csrc/ops/*.cpp")),
            # -isystem keeps torch's own warnings out of our build.
            cflags=[
                f"-isystem{torch / 'include'}",
                f"-isystem{torch / 'include/torch/csrc/api/include'}",
                f"-DTORCH_TARGET_VERSION=0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}{0:012x}",
            ],
            # libstdc++ first: torch's libraries export copies of some of its symbols, which we
            # must not come to depend on.
            ldflags=["-Wl,--no-undefined", "-lstdc++", f"-L{torch / 'lib'}"]
            + ["-ltorch", "-ltorch_cpu", "-lc10"],
            needs=["liblowrank_cpu.so"],
        ),
        Product(
            host_name(),
            sorted(glob("csrc/host/*.cpp")),
            cflags=[f"-isystem{pybind11_include()}", f"-isystem{python_include()}"],
            needs=["liblowrank_cpu.so"],
        ),
    ]


# ---- The tools, each found or named in one line ----


def compiler():
    """The compiler command of CXX, or the first one that compiles a C++17 file."""
    tried = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for command in map(shlex.split, tried):
        probe = [*command, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
        try:
            result = subprocess.run(probe, input=b"#include <vector>\n", capture_output=True)
        except OSError:  # not there, or not executable
            continue
        if result.returncode == 0:
            return command
    names = ", ".join(tried)
    fail(f"no working C++17 compiler (tried {names}): install g++ (apt install g++) or set CXX")


def ninja():
    try:
        import ninja
    except ImportError:
        fail("ninja is missing: pip install ninja")
    # In pip's isolated build environment the program is on PATH, outside BIN_DIR.
    program = shutil.which("ninja", path=ninja.BIN_DIR or None) or shutil.which("ninja")
    return program or fail("the ninja program is missing: pip install --force-reinstall ninja")


def torch_dir():
    """The folder of torch, found without the seconds that importing it takes."""
    wanted = f"torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}"
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        fail(f"PyTorch is missing: pip install '{wanted}' (then build with --no-build-isolation)")
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TORCH:
        fail(f"PyTorch {version} is too old: pip install '{wanted}'")
    return Path(spec.origin).parent


def pybind11_include():
    try:
        import pybind11
    except ImportError:
        fail("pybind11 is missing: pip install pybind11")
    return pybind11.get_include()


def python_include():
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        fail(f"no Python.h in {include}: install Python's headers (apt install python3-dev)")
    return include


# ---- The build ----


def write_ninja_file(path, cxx):
    """One edge per source file and per product. Headers are tracked by the compiler's depfiles."""
    from ninja import ninja_syntax

    def words(flags):
        return ninja_syntax.escape(shlex.join(flags))

    out = path.parent
    with path.open("w") as file:
        n = ninja_syntax.Writer(file, width=100)
        n.variable("builddir", str(out))  # where ninja keeps its log
        n.rule(
            "compile",
            f"{words([*cxx, *CXXFLAGS])} $cflags -MD -MF $out.d -c $in -o $out",
            description="compile $in",
            depfile="$out.d",
            deps="gcc",
        )
        n.rule(
            "link", f"{words(cxx)} -o $out $in {words(LDFLAGS)} $ldflags", description="link $out"
        )
        for product in products():
            objects = [str(out / Path(source).with_suffix(".o")) for source in product.sources]
            for source, target in zip(product.sources, objects):
                n.build(target, "compile", source, variables={"cflags": words(product.cflags)})
            n.build(
                str(out / product.name),
                "link",
                objects + [str(out / name) for name in product.needs],
                variables={"ldflags": words(product.ldflags)},
            )


class NinjaBuild(build_ext):
    """setuptools' build_ext with the compilation left to ninja."""

    def run(self):
        if not sys.platform.startswith("linux"):
            fail(f"only Linux is supported so far, this is {sys.platform}")
        os.chdir(Path(__file__).resolve().parent)  # ninja's paths are relative to this folder
        cxx, program = compiler(), ninja()
        folder = Path(self.build_temp)
        if self.editable_mode:  # setuptools' is thrown away: use our own, to rebuild quickly
            tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            folder = Path("build", f"temp.{tag}")
        folder.mkdir(parents=True, exist_ok=True)
        write_ninja_file(folder / "build.ninja", cxx)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([program, "-f", str(folder / "build.ninja"), *jobs]).returncode:
            fail("the C++ build failed, the message is above")
        package = Path("." if self.inplace else self.build_lib, PACKAGE)
        package.mkdir(parents=True, exist_ok=True)
        for name in product_names():
            # Replaced, never overwritten: a running process may have the old file mapped.
            shutil.copy2(folder / name, package / f"{name}.new")
            os.replace(package / f"{name}.new", package / name)

    def get_outputs(self):
        return [os.path.join(self.build_lib, PACKAGE, name) for name in product_names()]

    def get_output_mapping(self):
        pairs = zip(self.get_outputs(), product_names())
        return {built: os.path.join(PACKAGE, name) for built, name in pairs} if self.inplace else {}


setup(
    # For setuptools to know that the wheel is for one platform and Python; NinjaBuild builds it.
    ext_modules=[Extension(f"{PACKAGE}._host", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
