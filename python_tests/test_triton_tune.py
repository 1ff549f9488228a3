"""The choice of configurations and the file that keeps it; what is measured on a GPU is made up here."""

import json
import multiprocessing

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from lowrank_kernels.triton import tune

FAST, SLOW, HUGE = (tune.Config(rows, 64, 32, 1, 4, 2) for rows in (16, 32, 64))
TIMES = {FAST: 1.0, SLOW: 2.0, HUGE: float("inf")}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A GPU on which nothing is run; the configurations that were measured on it."""
    asked = []

    def milliseconds(config, run):
        asked.append(config)
        return TIMES[config]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LOWRANK_AUTOTUNE", raising=False)
    monkeypatch.setattr(tune, "_can_measure", lambda device: True)
    monkeypatch.setattr(tune, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU (80 GB)")
    tune._choices.cache_clear()
    yield asked
    tune._choices.cache_clear()


def choose(key="a key", configs=(SLOW, FAST, HUGE)):
    return tune.choose(key, configs, lambda config: None, torch.device("cuda"))


def test_the_fastest_is_measured_once_and_kept(measured, tmp_path):
    assert choose() == FAST and measured == [SLOW, FAST, HUGE]
    assert choose() == FAST and len(measured) == 3
    tune._choices.cache_clear()  # another process
    assert choose() == FAST and len(measured) == 3
    assert choose("another key") == FAST and len(measured) == 6
    (file,) = tmp_path.rglob("*.json")
    assert file == tune.cache_file("Some GPU (80 GB)") and len(json.loads(file.read_text())) == 2
    assert [p for p in file.parent.iterdir() if p != file] == []


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"a key": 3}', '{"a key": [1, 2]}', '{"a key": [0, 0, 0, 0, 0, 0]}',
                '{"a key": [16, 64, 32, 1, 4, "2"]}', '{"a key": [9, 9, 9, 9, 9, 9]}', "\0\0\0"],
)  # fmt: skip
def test_a_damaged_file_is_ignored_and_replaced(content, measured):
    file = tune.cache_file("Some GPU (80 GB)")
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert choose() == FAST and len(measured) == 3
    assert tune.load(file)["a key"] == FAST


def test_a_folder_that_cannot_be_made_is_no_error(measured, tmp_path):
    (tmp_path / "lowrank_kernels").write_text("a file where the folder should be")
    assert choose() == FAST and choose() == FAST and len(measured) == 3


def _save_many(file, worker):
    for i in range(30):
        tune.save(file, f"{worker} {i}", FAST)
        assert tune.load(file), "a reader saw a file that is not whole"


def test_processes_at_the_same_time_leave_a_whole_file(tmp_path):
    file = tmp_path / "choices.json"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_save_many, args=(file, n)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert set(tune.load(file).values()) == {FAST} and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("off", ["0", None])
def test_the_first_where_nothing_can_be_measured(off, monkeypatch):
    if off:
        monkeypatch.setenv("LOWRANK_AUTOTUNE", off)
    device = torch.device("cuda" if off else "cpu")
    assert tune.choose("k", (SLOW, FAST), lambda config: pytest.fail("run"), device) == SLOW
