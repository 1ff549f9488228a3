"""The table of planted faults fits the sources; ``make planted-faults`` plants them (see planted_faults.py)."""

import pathlib

import pytest

from planted_faults_table import FAULTS

ROOT = pathlib.Path(__file__).parents[1]


def test_the_table_is_long_enough_and_has_every_language():
    assert len(FAULTS) >= 24 and len({fault.breaks for fault in FAULTS}) == len(FAULTS)
    places = {"/".join(pathlib.PurePath(fault.file).parts[:2]) for fault in FAULTS}
    assert {"csrc/cpu", "csrc/cuda", "csrc/host"} <= places
    assert any(fault.file.endswith(".py") for fault in FAULTS)


@pytest.mark.parametrize("file", sorted({fault.file for fault in FAULTS}))
def test_every_fault_can_be_planted(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    for fault in FAULTS:
        if fault.file == file:
            assert text.count(fault.old) == 1, f"{fault.breaks}: {fault.old!r}"
            assert fault.new != fault.old


@pytest.mark.parametrize("test", sorted({test for fault in FAULTS for test in fault.tests}))
def test_every_test_that_must_notice_is_there(test):
    file, _, name = test.partition("::")
    assert f"def {name}(" in (ROOT / "python_tests" / file).read_text(encoding="utf-8") or not name
