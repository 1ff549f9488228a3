"""The Triton kernels without a GPU: every operator's tests in triton's interpreter, and what it cannot show.

``TRITON_INTERPRET`` is read when triton is imported, so these tests run in processes of their own, on a fixed
share of the cases that the other backends get (conftest.TRITON_SHARDS; ``LOWRANK_TEST_FULL=1``: all).

What the interpreter leaves untested: it multiplies the bits of bfloat16 as integers and cuts off where bfloat16 is
rounded, so primitives.dot widens operands there and primitives.rounded rounds by hand; instructions of tensor cores;
and the lookup in NVIDIA's registers, which is played here instead.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import conftest
from lowrank_kernels import triton as triton_kernels
from lowrank_kernels.codebooks import CODES, code_of
from lowrank_kernels.schema import OPS

HERE = pathlib.Path(__file__).parent
pytestmark = pytest.mark.skipif(
    conftest.ONLY_REFERENCE or conftest.ONLY_TRITON or conftest.ON_GPU,
    reason="LOWRANK_BACKEND or LOWRANK_TEST_DEVICE is set: this test starts processes that set them",
)
FILES = sorted({HERE / f"test_{op}.py" for op in (*OPS, "schema", "multi_lora", "triton_configs")})


def in_interpreter(*command: str, path: str = "") -> subprocess.CompletedProcess:
    """Runs Python with Triton in its interpreter; ``path`` comes before everything installed."""
    inherited = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(filter(None, [path, str(HERE.parent), inherited]))
    variables = {"TRITON_INTERPRET": "1", "LOWRANK_BACKEND": "triton", "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *command],
        cwd=HERE.parent, env=os.environ | variables, capture_output=True, text=True,
        timeout=7200 if conftest.FULL else 600,
    )  # fmt: skip


def run_tests(*arguments: str, path: str = "") -> None:
    done = in_interpreter("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, path=path)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and passed[1] != "0", done.stdout[-6000:] + done.stderr


@pytest.mark.parametrize("file", [f for f in FILES if f.exists()], ids=lambda f: f.stem)
def test_in_the_interpreter(file):
    pytest.importorskip("triton", reason="triton is not installed")
    run_tests(str(file))


# A folder with it, and with a numpy that its interpreter can use (before 2.4); `make test` makes one.
OLDEST = os.environ.get("LOWRANK_TRITON_OLDEST")


@pytest.mark.skipif(not OLDEST, reason="LOWRANK_TRITON_OLDEST names no folder; make test makes one")
def test_in_the_interpreter_of_the_oldest_version():
    version = in_interpreter("-c", "import triton; print(triton.__version__)", path=OLDEST)
    assert version.stdout.startswith("{}.{}.".format(*triton_kernels.OLDEST)), version
    run_tests(str(HERE / "test_linear_4bit.py"), str(HERE / "test_lora_linear_4bit_backward.py"),
              path=OLDEST)  # fmt: skip


# -- the lookup in registers -----------------------------------------------------------------------


def _prmt(a: int, b: int, selector: int) -> int:
    """PTX prmt.b32 in its default mode: four bytes of the eight of b and a; bit 3 would spread a sign."""
    source = (b << 32 | a).to_bytes(8, "little")
    result = bytearray()
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        result.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
    return int.from_bytes(result, "little")


def _play(asm: str, registers: dict[str, int]) -> dict[str, int]:
    """Runs the few PTX instructions of the lookup."""
    operations = {
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "shr.b32": lambda a, b: a >> b,
        "prmt.b32": _prmt,
    }
    for line in asm.strip("{}\n").split(";"):
        if not line.strip() or ".reg" in line:
            continue
        name, operands = line.strip().split(" ", 1)
        target, *sources = (part.strip() for part in operands.split(","))
        values = [registers[s] if s in registers else int(s, 0) for s in sources]
        registers[target] = operations[name](*values)
    return registers


@pytest.mark.parametrize("quant_type", CODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lookup_in_registers(quant_type, dtype):
    """All 65536 pairs of bytes, in the lower and in the upper half of a register."""
    pytest.importorskip("triton", reason="triton is not installed")
    from lowrank_kernels.triton import primitives

    bits = code_of(quant_type).to(dtype).view(torch.int16).tolist()
    planes = [[bit >> shift & 0xFF for bit in bits] for shift in (0, 8)]
    words = [int.from_bytes(bytes(p[i : i + 4]), "little") for p in planes for i in (0, 4, 8, 12)]
    registers = {f"${5 + 4 * i}": word for i, word in enumerate(words)}
    for value in range(1 << 16):
        packed = value << 16 | (value * 40503 & 0xFFFF)
        result = _play(primitives.LOOKUP_ASM.value, registers | {"$4": packed})
        nibbles = [packed >> 4 * i & 15 for i in range(8)]
        for side, first in (("even", 0), ("odd", 2)):
            codes = [bits[n] & 0xFFFF for n in (nibbles[1::2] if side == "even" else nibbles[::2])]
            expected = [codes[0] | codes[1] << 16, codes[2] | codes[3] << 16]
            assert [result[f"${first}"], result[f"${first + 1}"]] == expected, (side, hex(packed))
