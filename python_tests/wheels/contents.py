"""What a wheel of dist/ holds: exactly the files that are meant, honest metadata and tags, only stable symbols."""

from __future__ import annotations

import base64
import csv
import ctypes
import email
import functools
import hashlib
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from . import binaries

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = "lowrank_kernels"
MIN_TORCH = "2.10.0"
LIBTORCH = {"libtorch.so", "libtorch_cpu.so", "libc10.so"}
CUDA_LIBRARY = "liblowrank_cuda.so"

_GLIBC = {"1": 5, "2010": 12, "2014": 17}  # PEP 600: the minor version of older names
_MANYLINUX = re.compile(rf"manylinux(?:({'|'.join(_GLIBC)})|_(\d+)_(\d+))_")

# Run by a Python of the wheel's version, which needs no torch for it.
IMPORT_HOST = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_host", sys.argv[1])
host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(host)
assert host.isa_active() in host.isa_names(), host.isa_names()
"""


class WheelError(Exception):
    """What is wrong with a wheel, in one line."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise WheelError(message)


@functools.cache
def project_version() -> str:
    return re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]


class Wheel:
    """A wheel file and what its name says. WheelError: the name is none of a wheel."""

    def __init__(self, path: pathlib.Path) -> None:
        try:
            _, version, build, tags = parse_wheel_filename(path.name)
        except InvalidWheelFilename as error:
            raise WheelError(str(error)) from None
        self.path, self.version = path, str(version)
        self.python = {tag.interpreter for tag in tags}.pop()  # cp311
        self.platforms = sorted(tag.platform for tag in tags)
        # setup.py's build_tag, read backwards.
        name = build[1] if build else ""
        self.architectures = name.replace("PTX", "+PTX").split("_")[1:] if "cuda" in name else []

    @property
    def kind(self) -> str:
        return f"CUDA {' '.join(self.architectures)}" if self.architectures else "CPU"

    @property
    def host(self) -> str:
        machine = re.sub(rf"^({_MANYLINUX.pattern}|linux_)", "", self.platforms[0])
        return f"_host.cpython-{self.python[2:]}-{machine}-linux-gnu.so"

    def libraries(self) -> set[str]:
        cuda = {CUDA_LIBRARY} if self.architectures else set()
        return {"liblowrank_cpu.so", "_ops.so", self.host} | cuda

    def command(self) -> str | None:
        """A Python of this wheel's version on PATH, or None."""
        if self.python == f"cp{sys.version_info.major}{sys.version_info.minor}":
            return sys.executable
        name = f"python{self.python[2]}.{self.python[3:]}"
        try:  # what is on PATH may be a launcher that finds no such version
            done = subprocess.run([name, "-c", ""], capture_output=True)
        except FileNotFoundError:
            return None
        return name if done.returncode == 0 else None


def check(wheel: Wheel) -> str:
    """Everything that needs no torch. A few words for the table; WheelError: what is wrong."""
    require(zipfile.is_zipfile(wheel.path), "no zip file")
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel.path) as archive:
            check_files(wheel, archive)
            check_record(archive)
            archive.extractall(folder)
        package = pathlib.Path(folder, PACKAGE)
        check_metadata(wheel, pathlib.Path(folder, f"{PACKAGE}-{wheel.version}.dist-info"))
        check_platform(wheel)
        check_dependencies(wheel, package)
        check_torch_abi(package)
        if wheel.architectures:
            check_architectures(wheel, package / CUDA_LIBRARY)
        imported = check_host(wheel, package / wheel.host)
    return f"{wheel.path.stat().st_size / 1e6:.2f} MB, {imported}"


def check_files(wheel: Wheel, archive: zipfile.ZipFile) -> None:
    """Python files and data as they are in the sources, the native libraries, the metadata: no more, no less."""
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / PACKAGE).rglob("*.py")}
    sources |= {f"{PACKAGE}/py.typed"}
    data = {str(path.relative_to(ROOT)) for path in (ROOT / PACKAGE / "data").iterdir()}
    require(data, f"no data in {ROOT / PACKAGE / 'data'}")
    libraries = {f"{PACKAGE}/{name}" for name in wheel.libraries()}
    info = ("METADATA", "WHEEL", "RECORD", "top_level.txt", "licenses/LICENSE")
    metadata = {f"{PACKAGE}-{wheel.version}.dist-info/{name}" for name in info}
    expected = sources | data | libraries | metadata
    found = {name for name in archive.namelist() if not name.endswith("/")}
    require(not found - expected, f"files that do not belong there: {sorted(found - expected)}")
    require(not expected - found, f"files that are missing: {sorted(expected - found)}")
    for name in sorted(sources | data):
        same = archive.read(name) == (ROOT / name).read_bytes()
        require(same, f"{name} differs from the sources: make wheel again")


def check_record(archive: zipfile.ZipFile) -> None:
    """RECORD lists each file with its checksum."""
    (record,) = (name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
    rows = {row[0]: row[1] for row in csv.reader(archive.read(record).decode().splitlines())}
    for name in archive.namelist():
        if name.endswith("/"):
            continue
        digest = hashlib.sha256(archive.read(name)).digest()
        encoded = "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        expected = "" if name == record else encoded
        require(rows.get(name) == expected, f"RECORD is wrong about {name}")


def check_metadata(wheel: Wheel, info: pathlib.Path) -> None:
    fields = email.message_from_string((info / "METADATA").read_text())
    for name, value in (
        ("Name", PACKAGE),
        ("Version", project_version()),
        ("Requires-Python", ">=3.10"),
        ("License-Expression", "Apache-2.0"),
        ("Description-Content-Type", "text/markdown"),
    ):
        require(fields[name] == value, f"METADATA: {name} is {fields[name]!r}, expected {value!r}")
    always = {entry for entry in fields.get_all("Requires-Dist") if "extra ==" not in entry}
    expected = {
        f"torch>={MIN_TORCH.removesuffix('.0')}",
        "numpy",
        "safetensors",
        "tabulate>=0.9",
        "tqdm",
    }
    require(always == expected, f"METADATA: requires {sorted(always)}, not {sorted(expected)}")
    tags = email.message_from_string((info / "WHEEL").read_text())
    require(tags["Root-Is-Purelib"] == "false", "WHEEL: Root-Is-Purelib is not false")
    named = [f"{wheel.python}-{wheel.python}-{platform}" for platform in wheel.platforms]
    found = sorted(tags.get_all("Tag"))
    require(found == named, f"WHEEL: tags {found}, the file name says {named}")


def check_platform(wheel: Wheel) -> None:
    """The tag is a manylinux one, and promises no system older than the symbols need."""
    report = json.loads(run(sys.executable, "-m", "auditwheel", "show", "--json", str(wheel.path)))
    needed = glibc(report["sym_tag"])
    for platform in wheel.platforms:
        require(glibc(platform), f"platform tag {platform}, expected manylinux_*")
        require(needed, f"tagged {platform}, but its symbols fit no manylinux tag")
        honest = glibc(platform) >= needed
        require(honest, f"tagged {platform}, but its symbols need {report['sym_tag']}")
    foreign = set(report["external_libs"]) - LIBTORCH
    require(not foreign, f"needs {sorted(foreign)}, which neither the system nor torch has")


def glibc(platform: str) -> tuple[int, int] | None:
    """(2, 34) of manylinux_2_34_x86_64, as of the older names; None of another tag."""
    match = _MANYLINUX.match(platform)
    if match is None:
        return None
    return (2, _GLIBC[match[1]]) if match[1] else (int(match[2]), int(match[3]))


def check_dependencies(wheel: Wheel, package: pathlib.Path) -> None:
    """Each library finds the others beside it, and asks nothing else of torch than its C names."""
    allowed = {
        "_ops.so": {"liblowrank_cpu.so"} | LIBTORCH,
        wheel.host: {"liblowrank_cpu.so"},
        "liblowrank_cpu.so": set(),
    }
    try:
        for name, libraries in allowed.items():
            needed = binaries.needed_libraries(package / name)
            require(needed <= libraries, f"{name} needs {sorted(needed - libraries)}")
        unstable = binaries.unstable_symbols(package / "_ops.so")
    except ValueError as error:
        raise WheelError(str(error)) from None
    require(not unstable, f"_ops.so uses unstable symbols of torch: {sorted(unstable)[:3]}")


def check_torch_abi(package: pathlib.Path) -> None:
    """torch-abi-audit's opinion of the same."""
    program = "import sys; from torch_abi_audit.cli import main; sys.exit(main())"
    report = json.loads(run(sys.executable, "-c", program, "--json", str(package)))
    libraries = {pathlib.Path(e["path"]).name: e for e in report["extensions"]}
    libraries |= {pathlib.Path(e["path"]).name: e for e in report["bundled_libs"]}
    for name, library in libraries.items():
        found = library["torch"]
        require(library["error"] is None, f"torch-abi-audit: {name}: {library['error']}")
        uses = name == "_ops.so"
        require(found["uses_torch"] == uses, f"torch-abi-audit: {name}: uses_torch is {not uses}")
        bad = found["unstable_symbols"] + found["unknown_shim_symbols"]
        require(not bad, f"torch-abi-audit: {name} uses unstable symbols: {bad[:3]}")
    require("_ops.so" in libraries, "torch-abi-audit did not see _ops.so")
    oldest = libraries["_ops.so"]["torch"]["min_torch_version"]
    require(oldest == MIN_TORCH, f"torch-abi-audit: needs torch {oldest}, expected {MIN_TORCH}")


def check_architectures(wheel: Wheel, path: pathlib.Path) -> None:
    """The list of the file's name, that of the library and the machine code in it are one."""
    library = ctypes.CDLL(str(path))  # opens without a driver: the CUDA runtime is inside
    library.lk_cuda_architectures.restype = ctypes.c_char_p
    says = library.lk_cuda_architectures().decode().split()
    require(says == wheel.architectures, f"{path.name} says it is for {' '.join(says)}")
    expected = binaries.fatbin_entries_of(wheel.architectures)
    found = binaries.fatbin_entries(path.read_bytes())
    require(found, f"{path.name} holds no code for GPUs")
    for entries in found:
        require(entries == expected, f"{path.name} holds code for {sorted(entries)}")


def check_host(wheel: Wheel, path: pathlib.Path) -> str:
    """Imports the one module that is made for one Python, if there is such a Python."""
    command = wheel.command()
    if command is None:
        return f"no {wheel.python} here to import _host"
    run(command, "-I", "-c", IMPORT_HOST, str(path))
    return "_host imported"


def run(*command: str) -> str:
    """Its standard output. WheelError with its error if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise WheelError(reason(done.stderr or done.stdout))
    return done.stdout


def reason(text: str) -> str:
    """The line of a failed program's output that says why: its last error, else its last line."""
    errors = re.findall(r"^[\w.]*(?:Error|ERROR)\b.*$", text, re.M)
    return errors[-1] if errors else last_line(text) or "no output"


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""
