"""``make wheel-check`` finds what is wrong with a wheel; the workflow and the Makefile fit together."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import pathlib
import re
import shutil
import subprocess
import sysconfig
import zipfile

import pytest

import lowrank_kernels
from test_cuda_build import load
from wheels import check, contents, smoke
from wheels.contents import PACKAGE, ROOT, Wheel, WheelError

INFO = f"{PACKAGE}-{contents.project_version()}.dist-info"
BUILT = pathlib.Path(
    lowrank_kernels.__file__
).parent  # the native libraries, as `make test` built them
PYTHON = "cp" + sysconfig.get_config_var("py_version_nodot")
PLATFORM = f"manylinux_2_34_{sysconfig.get_platform().rpartition('-')[2]}"
NAME = f"{PACKAGE}-{contents.project_version()}-{PYTHON}-{PYTHON}-{PLATFORM}.whl"

METADATA = f"""\
Metadata-Version: 2.4
Name: {PACKAGE}
Version: {contents.project_version()}
Requires-Python: >=3.10
License-Expression: Apache-2.0
Description-Content-Type: text/markdown
Requires-Dist: torch>=2.10
Requires-Dist: numpy
Requires-Dist: safetensors
Requires-Dist: tabulate>=0.9
Requires-Dist: tqdm
Requires-Dist: pytest>=9; extra == "test"

"""
WHEEL = f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {PYTHON}-{PYTHON}-{PLATFORM}\n"


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """What a right wheel for this Python holds, but for RECORD."""
    found = {f"{INFO}/METADATA": METADATA.encode(), f"{INFO}/WHEEL": WHEEL.encode()}
    found |= {f"{INFO}/top_level.txt": b"lowrank_kernels\n", f"{INFO}/licenses/LICENSE": b"..."}
    sources = [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / PACKAGE / "data").iterdir()]
    for path in [*sources, ROOT / PACKAGE / "py.typed"]:
        found[str(path.relative_to(ROOT))] = path.read_bytes()
    for name in ("liblowrank_cpu.so", "_ops.so", "_host" + sysconfig.get_config_var("EXT_SUFFIX")):
        found[f"{PACKAGE}/{name}"] = (BUILT / name).read_bytes()
    return found


def record_of(files: dict[str, bytes]) -> bytes:
    lines = [f"{INFO}/RECORD,,"]
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}")
    return "\n".join(lines).encode()


def write(path: pathlib.Path, files: dict[str, bytes], record: bytes | None = None) -> Wheel:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(f"{INFO}/RECORD", record_of(files) if record is None else record)
    return Wheel(path)


@pytest.fixture
def audited(monkeypatch):
    """What auditwheel and torch-abi-audit, which the tests do not need, say about a right wheel."""
    torch = {"uses_torch": True, "unstable_symbols": [], "unknown_shim_symbols": []}
    ops = {"path": "_ops.so", "error": None, "torch": {**torch, "min_torch_version": "2.10.0"}}
    said = {
        "auditwheel": {"sym_tag": PLATFORM, "external_libs": {"libtorch_cpu.so": None}},
        "torch_abi_audit": {"extensions": [], "bundled_libs": [ops]},
    }
    real = contents.run

    def run(*command: str) -> str:
        line = " ".join(command)
        return next(
            (json.dumps(text) for name, text in said.items() if name in line), None
        ) or real(*command)

    monkeypatch.setattr(contents, "run", run)
    return said


def test_a_right_wheel_passes(tmp_path, files, audited):
    assert "_host imported" in contents.check(write(tmp_path / NAME, files))


def test_the_metadata_that_is_expected_is_that_of_the_project():
    requires = importlib.metadata.requires(PACKAGE)
    listed = set(re.findall(r"^Requires-Dist: ([^;\n]+)$", METADATA, re.M))
    assert {entry for entry in requires if "extra ==" not in entry} == listed


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("python_tests/cases.py", b"", "do not belong there: ['python_tests/cases.py']"),
        (f"{PACKAGE}/kernels.cpp", b"", "do not belong there"),
        (f"{PACKAGE}/liblowrank_cuda.so", b"", "do not belong there"),
        (f"{PACKAGE}.libs/liblowrank_cpu-1234abcd.so", b"", "do not belong there"),
        (f"{PACKAGE}/py.typed", None, f"missing: ['{PACKAGE}/py.typed']"),
        (f"{PACKAGE}/data/keeper.jsonl", None, "missing"),
        (f"{PACKAGE}/_ops.so", None, "missing"),
        (f"{INFO}/licenses/LICENSE", None, "missing"),
        (f"{PACKAGE}/nn.py", b"# old", f"{PACKAGE}/nn.py differs from the sources"),
        (f"{PACKAGE}/_ops.so", b"no library", "_ops.so is no shared object"),
    ],
)
def test_wrong_files_are_named(tmp_path, files, audited, name, data, says):
    changed = {k: v for k, v in files.items() if k != name} | (
        {name: data} if data is not None else {}
    )
    with pytest.raises(WheelError, match=re.escape(says)) as error:
        contents.check(write(tmp_path / NAME, changed))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("METADATA", "torch>=2.10", "torch>=2.9"),
        ("METADATA", "Requires-Dist: tqdm\n", "Requires-Dist: tqdm\nRequires-Dist: peft\n"),
        ("METADATA", ">=3.10", ">=3.9"),
        ("METADATA", "Version: 0", "Version: 9"),
        ("WHEEL", "false", "true"),
        ("WHEEL", PLATFORM, "linux_x86_64"),
    ],
)
def test_wrong_metadata_is_named(tmp_path, files, audited, name, old, new):
    text = files[f"{INFO}/{name}"].decode()
    assert old in text
    wheel = write(tmp_path / NAME, files | {f"{INFO}/{name}": text.replace(old, new).encode()})
    with pytest.raises(WheelError, match=f"{name}: "):
        contents.check(wheel)


def test_a_wrong_checksum_is_named(tmp_path, files, audited):
    record = record_of({**files, f"{PACKAGE}/nn.py": b"something else"})
    with pytest.raises(WheelError, match=f"RECORD is wrong about {PACKAGE}/nn.py"):
        contents.check(write(tmp_path / NAME, files, record))


@pytest.mark.parametrize(
    ("tag", "needed", "says"),
    [
        (PLATFORM, "manylinux_2_35_x86_64", "its symbols need manylinux_2_35"),
        (PLATFORM, "linux_x86_64", "its symbols fit no manylinux tag"),
        ("linux_x86_64", "manylinux_2_34_x86_64", "expected manylinux"),
        ("manylinux_2_28_x86_64", "manylinux_2_34_x86_64", "need manylinux_2_34"),
    ],
)
def test_a_platform_tag_that_promises_too_much(tmp_path, audited, tag, needed, says):
    audited["auditwheel"]["sym_tag"] = needed
    with pytest.raises(WheelError, match=says):
        contents.check_platform(Wheel(tmp_path / NAME.replace(PLATFORM, tag)))


@pytest.mark.parametrize(
    "tag", ["manylinux2014_x86_64.manylinux_2_17_x86_64", "manylinux_2_28_x86_64", "linux_x86_64"]
)
def test_the_machine_is_read_from_every_platform_tag(tmp_path, tag):
    wheel = Wheel(tmp_path / NAME.replace(PLATFORM, tag))
    assert wheel.host == f"_host.cpython-{PYTHON[2:]}-x86_64-linux-gnu.so"
    versions = {contents.glibc(platform) for platform in wheel.platforms}
    minor = {"linux_x86_64": None, "manylinux_2_28_x86_64": (2, 28)}.get(tag, (2, 17))
    assert versions == {minor}


def test_a_library_of_somewhere_else_is_named(tmp_path, audited):
    audited["auditwheel"]["external_libs"] = {"libcudart.so.13": None}
    with pytest.raises(WheelError, match=r"libcudart\.so\.13"):
        contents.check_platform(Wheel(tmp_path / NAME))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("unstable_symbols", ["_ZN2at6TensorC1Ev"], "unstable symbols"),
        ("min_torch_version", "2.13.0", r"needs torch 2\.13\.0"),
        ("uses_torch", False, "uses_torch"),
    ],
)
def test_what_torch_abi_audit_finds_is_repeated(tmp_path, audited, key, value, says):
    audited["torch_abi_audit"]["bundled_libs"][0]["torch"][key] = value
    with pytest.raises(WheelError, match=says):
        contents.check_torch_abi(tmp_path)


# -- the symbols and the machine code ---------------------------------------------------------------

needs_gcc = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


def compile_library(target: pathlib.Path, source: str, *flags: str) -> pathlib.Path:
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(target), *flags]
    subprocess.run(command, input=source, text=True, check=True)
    return target


@needs_gcc
@pytest.mark.parametrize("flags", [(), ("-Wl,-rpath,$ORIGIN",)])
def test_symbols_of_torch_and_a_missing_run_path_are_found(tmp_path, files, flags):
    host = "_host" + sysconfig.get_config_var("EXT_SUFFIX")
    for name in ("liblowrank_cpu.so", host):
        (tmp_path / name).write_bytes(files[f"{PACKAGE}/{name}"])
    source = "namespace at { int dim(int); }\nint f() { return at::dim(1); }\n"
    compile_library(tmp_path / "_ops.so", source, *flags)
    says = r"unstable symbols of torch: \['_ZN2at3dimEi'\]" if flags else "no .ORIGIN run path"
    with pytest.raises(WheelError, match=says):
        contents.check_dependencies(Wheel(tmp_path / NAME), tmp_path)


def cuda_library(target: pathlib.Path, says: str, number: int, flags: int) -> pathlib.Path:
    """A library that names its architectures and holds one fat binary with one empty cubin."""
    header = f"0xba55ed50, 0x100001, {48 + 8}, 0"  # magic, version and size of the header, size
    # kind and version, size of the header, size (8 bytes), then up to the architecture and flags
    entry = f"0x1010002, 48, 8, 0, 0, 0, 0, {number}, 0, 0, {flags}, 0, 0, 0"
    return compile_library(
        target,
        f'extern "C" const char* lk_cuda_architectures() {{ return "{says}"; }}\n'
        f'extern "C" unsigned data[] = {{{header}, {entry}}};\n',
    )


@needs_gcc
@pytest.mark.parametrize(
    ("says", "number", "flags", "wrong"),
    [
        ("9.0a", 90, 1 << 20, None),
        ("9.0a 10.0", 90, 1 << 20, "says it is for 9.0a 10.0"),
        ("9.0a", 90, 0, r"holds code for \['sm_90'\]"),
        ("9.0a", 80, 0, r"holds code for \['sm_80'\]"),
    ],
)
def test_architectures_of_name_library_and_code_must_agree(tmp_path, says, number, flags, wrong):
    wheel = Wheel(tmp_path / NAME.replace(f"-{PYTHON}-", f"-1cuda_9.0a-{PYTHON}-", 1))
    path = cuda_library(tmp_path / f"{wheel.architectures[0]}.so", says, number, flags)
    if wrong is None:
        contents.check_architectures(wheel, path)
    else:
        with pytest.raises(WheelError, match=wrong):
            contents.check_architectures(wheel, path)


def test_the_build_tag_is_read_as_it_is_written(tmp_path):
    setup = load("setup.py")
    entries = setup.parse_architectures(setup.CUDA_ARCHITECTURES)
    tag = setup.build_tag(entries)
    wheel = Wheel(tmp_path / NAME.replace(f"-{PYTHON}-", f"-{tag}-{PYTHON}-", 1))
    assert wheel.architectures == entries
    assert wheel.kind == f"CUDA {setup.CUDA_ARCHITECTURES}"
    assert Wheel(tmp_path / NAME).kind == "CPU"


def test_names_of_other_files_are_refused(tmp_path):
    with pytest.raises(WheelError, match="wheel"):
        Wheel(tmp_path / f"{PACKAGE}-0.1.0-any.whl")


# -- the program ------------------------------------------------------------------------------------


def run_check(capsys, *arguments: str) -> tuple[int, str, str]:
    code = check.main(list(arguments))
    out, err = capsys.readouterr()
    assert len(err.splitlines()) <= 1
    return code, out, err


def test_an_empty_folder_is_no_success(tmp_path, capsys):
    code, _, err = run_check(capsys, "--dist", str(tmp_path))
    assert code == 1
    assert "make wheel" in err


def test_a_failure_is_in_the_table_and_on_one_line(tmp_path, capsys, files, audited):
    write(tmp_path / NAME, files)
    broken = NAME.replace(PYTHON, "cp399")
    (tmp_path / broken).write_text("no zip")
    code, out, err = run_check(capsys, "--dist", str(tmp_path), "--no-smoke", "--sdist")
    assert code == 1
    assert re.search(rf"^CPU +{PYTHON} +- +\d+ +[\d.]+ MB, _host imported$", out, re.M)
    assert re.search(r"^CPU +cp399 +- +\d+ +FAILED: no zip file$", out, re.M)
    assert "FAILED: there is no lowrank_kernels-" in out
    assert err == "wheel-check: 2 of 3 failed: CPU, cp399, torch -: FAILED: no zip file\n"


@pytest.mark.parametrize(
    ("python", "says"),
    [("python3.99", "there is no python3.99"), ("false", "false: no output")],
)
def test_a_python_that_is_not_there_fails(tmp_path, capsys, files, audited, python, says):
    write(tmp_path / NAME, files)
    code, _, err = run_check(capsys, "--dist", str(tmp_path), "--python", python)
    assert code == 1
    assert says in err


def test_a_python_without_a_wheel_fails(tmp_path, capsys, audited):
    (tmp_path / NAME.replace(PYTHON, "cp399")).write_text("no zip")
    code, out, _ = run_check(capsys, "--dist", str(tmp_path))
    assert code == 1
    assert f"no wheel for {PYTHON}" in out


def test_the_error_of_a_failed_program_is_its_reason():
    traceback = "Traceback\n  File\nmodule.SomeError: why\n\nSet VERBOSE=1 for more\n"
    assert contents.reason(traceback) == "module.SomeError: why"
    assert contents.reason("one\ntwo\n") == "two"
    assert contents.reason("") == "no output"


def test_smoke_refuses_what_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(AssertionError, match="was imported, expected one below"):
        smoke.installed()


@pytest.mark.parametrize("step", [smoke.training, smoke.many_adapters, smoke.files])
def test_smoke_works_on_the_sources(step):
    step()


# -- the workflow and the Makefile ------------------------------------------------------------------


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text()
    return set(re.search(r"^\.PHONY: (.+)$", text, re.M)[1].split())


def test_the_workflow_calls_targets_that_exist():
    yaml = pytest.importorskip("yaml", reason="needs PyYAML (comes with transformers)")
    path = ROOT / ".github/workflows/wheels.yml"
    if not path.exists():
        pytest.skip("an sdist has no workflow")
    jobs = yaml.safe_load(path.read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    called = [word for s in steps for word in re.findall(r"^make ([\w-]+)", s.get("run", ""), re.M)]
    assert {"wheels", "wheel-check"} <= set(called) <= make_targets()
    for step in steps:
        assert re.search(r"@v\d+$", step.get("uses", "@v1")), "an action without a version"
    needs = {name: job.get("needs") for name, job in jobs.items()}
    assert needs == {"build": None, "verify": "build", "arm": None, "release": ["verify", "arm"]}
    matrix = jobs["verify"]["strategy"]["matrix"]
    assert set(matrix["python"]) == supported_pythons()
    built = {each["machine"] for each in jobs["build"]["strategy"]["matrix"]["include"]}
    assert set(matrix["machine"]) == built == {"x86_64", "aarch64"}


def supported_pythons() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text()
    return set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text))


def test_wheels_are_made_for_the_pythons_that_are_supported():
    minors = re.search(r"foreach minor,([\d ]+),", (ROOT / "Makefile").read_text())[1].split()
    assert {f"3.{minor}" for minor in minors} == supported_pythons()
