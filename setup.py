"""Builds the native parts: shared objects inside the package folder, made by one ninja run.

    liblowrank_cpu.so    csrc/cpu, csrc/cpu/isa   the kernels; no torch, no Python
    _ops.so              csrc/ops                 torch ops on the LibTorch stable ABI; no Python
    _host.<suffix>.so    csrc/host                pybind11 module: ISA and build introspection, page pool,
                                                  batch planner
    liblowrank_cuda.so   csrc/cuda/launch         CUDA kernels, by nvcc; no torch, no Python

Environment:

    CXX                   the C++ compiler, of nvcc's host code too
    MAX_JOBS              number of parallel compilations
    LOWRANK_BUILD_CUDA    1: with CUDA, or fail; 0: without; auto (default): with CUDA if there is an
                          nvcc, and torch is a CUDA build or TORCH_CUDA_ARCH_LIST is set
    TORCH_CUDA_ARCH_LIST  GPU architectures as torch writes them: "8.0 9.0a 12.0+PTX"
    CUDA_HOME             the CUDA toolkit (then CUDA_PATH, nvcc on PATH, /usr/local/cuda)
"""

import functools
import importlib.metadata
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path
from typing import NamedTuple

from setuptools import Command, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

PACKAGE = "lowrank_kernels"
MIN_TORCH = (2, 10)
# The flags of every compilation, those in the Makefile included.
COMMON_FLAGS = shlex.split((Path(__file__).parent / "csrc/flags").read_text(), comments=True)
CXXFLAGS = ["-O3", *COMMON_FLAGS]
LDFLAGS = ["-shared", "-Wl,-rpath,$ORIGIN", "-Wl,--as-needed"]

CUDA_LIBRARY = "liblowrank_cuda.so"
CUDA_ARCHITECTURES = "8.0 8.6 8.9 9.0a 10.0 12.0+PTX"
# -Xptxas -v: registers, shared memory and spills of each kernel, kept in <object>.log. No --threads:
# ptxas processes that run at once would mix their lines there.
# --expt-relaxed-constexpr: kernels call the constexpr functions of csrc/common, as they stand.
NVCC_OWN_FLAGS = [flag for flag in COMMON_FLAGS if flag.startswith(("-std=", "-I"))]
NVCCFLAGS = [
    *("-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", *NVCC_OWN_FLAGS),
    *("-Xcompiler", ",".join(flag for flag in COMMON_FLAGS if flag not in NVCC_OWN_FLAGS)),
]
# Nothing to link on the device (-nodlink), and none of cudart's symbols among ours.
NVCC_LDFLAGS = shlex.split(
    "-shared -nodlink -cudart static -Xlinker --exclude-libs,ALL,--no-undefined,--as-needed"
    f" -Xlinker -soname,{CUDA_LIBRARY}"
)


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
    return ["liblowrank_cpu.so", "_ops.so", host_name(), *([CUDA_LIBRARY] if cuda()[0] else [])]


def products():
    """What the C++ compiler builds."""
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
            # -ldl: dlopen of the CUDA library; part of libc since glibc 2.34.
            + ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl"],
            needs=["liblowrank_cpu.so"],
        ),
        Product(
            host_name(),
            sorted({*glob("csrc/host/*.cpp")} - {"csrc/host/selftest.cpp"}),
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


# ---- CUDA: whether, with which nvcc, for which architectures ----


class Cuda(NamedTuple):
    """How the CUDA library is built."""

    nvcc: str
    architectures: list[str]


@functools.cache
def cuda():
    """A pair: how the CUDA library is built, or None if it is not; and why not."""
    wanted = os.environ.get("LOWRANK_BUILD_CUDA") or "auto"
    if wanted not in ("0", "1", "auto"):
        fail(f"LOWRANK_BUILD_CUDA: expected 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        return None, "LOWRANK_BUILD_CUDA=0"
    nvcc, tried = find_nvcc()
    if nvcc is None:
        if wanted == "1":
            fail(f"LOWRANK_BUILD_CUDA=1 but no nvcc ({tried}): set CUDA_HOME to a CUDA toolkit")
        return None, f"no nvcc ({tried}; CUDA_HOME names a CUDA toolkit)"
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if wanted == "auto" and not listed and not torch_has_cuda():
        return None, "torch is a CPU build (LOWRANK_BUILD_CUDA=1 builds them all the same)"
    return Cuda(nvcc, choose_architectures(nvcc, listed)), None


def find_nvcc():
    """nvcc, or None; and where it was looked for."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):  # what is said explicitly counts alone
        if home := os.environ.get(variable):
            return shutil.which("nvcc", path=f"{home}/bin"), f"{variable} is {home}"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return nvcc, "neither on PATH nor in /usr/local/cuda"


def torch_has_cuda():
    version = torch_dir() / "version.py"  # read, not imported: that takes seconds
    return bool(re.search(r"^cuda\b.*= *['\"]", version.read_text(), re.MULTILINE))


def choose_architectures(nvcc, listed):
    """Those of TORCH_CUDA_ARCH_LIST; else the default ones, as far as this nvcc knows them."""
    entries = parse_architectures(listed or CUDA_ARCHITECTURES)
    known = [entry for entry in entries if can_compile(nvcc, entry)]
    if listed and known != entries:
        bad = next(entry for entry in entries if entry not in known)
        fail(f"TORCH_CUDA_ARCH_LIST: {nvcc} cannot compile for {bad!r}")
    if not known:
        fail(f"{nvcc} is too old: it knows none of {CUDA_ARCHITECTURES}")
    if not listed and known != entries:  # so that GPUs newer than this nvcc work
        plain = max(i for i, entry in enumerate(known) if entry[-1].isdigit())
        known[plain] += "+PTX"
    return known


def parse_architectures(text):
    """The entries of a list in torch's syntax, sorted and each once: "9.0a;8.6" is 8.6, 9.0a."""
    found = {}
    for entry in re.split(r"[\s;]+", text.strip(" ;")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            fail(
                f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.6, 9.0a, 12.0+PTX, got {entry!r}"
            )
        major, minor, suffix, ptx = match.groups()
        if int(major) < 8:
            fail(f"TORCH_CUDA_ARCH_LIST: the kernels need 8.0 or later, got {entry!r}")
        key = (int(major), int(minor), suffix)
        found[key] = found.get(key) or ptx or ""
    return [
        f"{major}.{minor}{suffix}{found[major, minor, suffix]}"
        for major, minor, suffix in sorted(found)
    ]


def build_tag(architectures):
    """What stands in a wheel's file name: 1cuda_9.0a_12.0PTX. (pip wants a digit first, no plus.)"""
    return "_".join(["1cuda", *architectures]).replace("+", "")


def gencode(entry):
    number = entry.removesuffix("+PTX").replace(".", "")
    codes = f"[sm_{number},compute_{number}]" if entry.endswith("+PTX") else f"sm_{number}"
    return ["-gencode", f"arch=compute_{number},code={codes}"]


def can_compile(nvcc, entry):
    # A dry run knows the variants a and f as well, which --list-gpu-arch leaves out.
    probe = [nvcc, "--dryrun", *gencode(entry), "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    return subprocess.run(probe, capture_output=True).returncode == 0


# ---- The build ----


def words(flags):
    """Flags for a command in a ninja file."""
    from ninja import ninja_syntax

    return ninja_syntax.escape(shlex.join(flags))


def write_ninja_file(path, cxx, products, cuda):
    """One edge per source file and per product. Headers are tracked by the compiler's depfiles."""
    from ninja import ninja_syntax

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        n = ninja_syntax.Writer(file, width=100)
        n.variable("builddir", str(path.parent))  # where ninja keeps its log
        if products:
            write_cxx_edges(n, path.parent, cxx, products)
        if cuda:
            write_cuda_edges(n, path.parent, cxx, cuda)


def write_cxx_edges(n, out, cxx, products):
    n.rule(
        "compile",
        f"{words([*cxx, *CXXFLAGS])} $cflags -MD -MF $out.d -c $in -o $out",
        description="compile $in",
        depfile="$out.d",
        deps="gcc",
    )
    n.rule("link", f"{words(cxx)} -o $out $in {words(LDFLAGS)} $ldflags", description="link $out")
    for product in products:
        objects = [str(out / Path(source).with_suffix(".o")) for source in product.sources]
        for source, target in zip(product.sources, objects):
            n.build(target, "compile", source, variables={"cflags": words(product.cflags)})
        n.build(
            str(out / product.name),
            "link",
            objects + [str(out / name) for name in product.needs],
            variables={"ldflags": words(product.ldflags)},
        )


def write_cuda_edges(n, out, cxx, cuda):
    # nvcc takes one program: of "ccache g++ -pipe" that is g++; flags go through.
    program = list(itertools.takewhile(lambda word: not word.startswith("-"), cxx))
    host = ["-ccbin", program[-1], *(f"-Xcompiler={flag}" for flag in cxx[len(program) :])]
    flags = [*NVCCFLAGS, f'-DLOWRANK_CUDA_ARCHITECTURES="{" ".join(cuda.architectures)}"']
    for entry in cuda.architectures:
        flags += gencode(entry)
    usage = subprocess.run([cuda.nvcc, "--help"], capture_output=True, text=True).stdout
    if "--compress-mode" in usage:  # nvcc 12.8
        flags.append("--compress-mode=size")
    n.rule(
        "nvcc",
        f"{words([cuda.nvcc, *host, *flags])} -MD -MF $out.d -c $in -o $out >$out.log 2>&1"
        " || { cat $out.log; exit 1; }; sed -n '/warning/,+4p' $out.log",
        description="nvcc $in",
        depfile="$out.d",
        deps="gcc",
    )
    # nvcc looks into lib64, where toolkits have it; PyPI's packages of nvcc have lib alone.
    libraries = f"-L{Path(cuda.nvcc).resolve().parents[1] / 'lib'}"
    n.rule(
        "nvcc_link",
        f"{words([cuda.nvcc, *host, libraries])} -o $out $in {words(NVCC_LDFLAGS)}",
        description="link $out",
    )
    sources = sorted(glob("csrc/cuda/launch/*.cu"))
    objects = [str(out / Path(source).with_suffix(".o")) for source in sources]
    for source, target in zip(sources, objects):
        n.build(target, "nvcc", source, implicit_outputs=[f"{target}.log"])
    n.build(str(out / CUDA_LIBRARY), "nvcc_link", objects)


def run_ninja(program, folder):
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    if subprocess.run([program, "-f", str(folder / "build.ninja"), *jobs]).returncode:
        fail("the build failed, the message is above")


def write_compile_commands(program, folder):
    """compile_commands.json in the source folder, from which clangd and other tools learn the commands."""
    command = [program, "-f", str(folder / "build.ninja"), "-t", "compdb", "compile"]
    commands = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    Path("compile_commands.json").write_text(commands)


def enter_sources():
    if not sys.platform.startswith("linux"):
        fail(f"only Linux is supported so far, this is {sys.platform}")
    os.chdir(Path(__file__).resolve().parent)  # ninja's paths are relative to this folder


class NinjaBuild(build_ext):
    """setuptools' build_ext with the compilation left to ninja."""

    def run(self):
        enter_sources()
        cxx, program = compiler(), ninja()
        folder = Path(self.build_temp)
        if self.editable_mode:  # setuptools' is thrown away: use our own, to rebuild quickly
            tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            folder = Path("build", f"temp.{tag}")
        chosen, reason = cuda()
        what = f"CUDA kernels for {' '.join(chosen.architectures)}" if chosen else "no CUDA kernels"
        print(f"{PACKAGE}: {what}{'' if chosen else f': {reason}'}", flush=True)
        write_ninja_file(folder / "build.ninja", cxx, products(), chosen)
        run_ninja(program, folder)
        if self.inplace:
            write_compile_commands(program, folder)
        package = Path("." if self.inplace else self.build_lib, PACKAGE)
        package.mkdir(parents=True, exist_ok=True)
        for name in product_names():
            # Replaced, never overwritten: a running process may have the old file mapped.
            shutil.copy2(folder / name, package / f"{name}.new")
            os.replace(package / f"{name}.new", package / name)
        if not chosen:  # one of an earlier build would not match the others
            (package / CUDA_LIBRARY).unlink(missing_ok=True)

    def get_outputs(self):
        return [os.path.join(self.build_lib, PACKAGE, name) for name in product_names()]

    def get_output_mapping(self):
        pairs = zip(self.get_outputs(), product_names())
        return {built: os.path.join(PACKAGE, name) for built, name in pairs} if self.inplace else {}


class TaggedWheel(bdist_wheel):
    """With CUDA, a build tag that lists the architectures: it names the wheel's file, and lets pip
    prefer it to the one without."""

    def finalize_options(self):
        chosen, _ = cuda()
        if chosen and self.build_number is None:
            self.build_number = build_tag(chosen.architectures)
        super().finalize_options()


class CudaBuild(Command):
    """The CUDA library alone: needs nvcc and ninja, no torch. Installs nothing."""

    user_options = [("build-temp=", "t", "folder of the objects, their logs and the library")]

    def initialize_options(self):
        self.build_temp = "build/cuda"

    def finalize_options(self):
        pass

    def run(self):
        enter_sources()
        os.environ.setdefault("LOWRANK_BUILD_CUDA", "1")
        chosen, reason = cuda()
        if chosen is None:
            fail(f"no CUDA kernels: {reason}")
        folder = Path(self.build_temp)
        write_ninja_file(folder / "build.ninja", compiler(), [], chosen)
        run_ninja(ninja(), folder)


if __name__ == "__main__":
    setup(
        # For setuptools to know that the wheel is for one platform and Python.
        ext_modules=[Extension(f"{PACKAGE}._host", sources=[])],
        cmdclass={
            "build_ext": NinjaBuild,
            "build_cuda": CudaBuild,
            "bdist_wheel": TaggedWheel,
        },
    )
