"""``bench``: what it measures, its table, JSON and picture, and what it refuses."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import lowrank_kernels as lk
import lowrank_kernels.cli as cli
from lowrank_kernels.benchmark import providers
from lowrank_kernels.cli import bench

SMALL = ("--shape", "64x128", "--m", "1,5", "--seconds", "0.001")


@pytest.fixture(autouse=True)
def few_copies(monkeypatch):
    monkeypatch.setattr(providers, "MAX_COPIES", 2)


def run(*arguments: object) -> int:
    return cli.run(cli.parser().parse_args(["bench", *map(str, arguments)]))


def test_table_json_and_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="--plot draws with matplotlib")
    pytest.importorskip("bitsandbytes", reason="a column of the table")
    pytest.importorskip("peft", reason="a column of the table")
    target, picture = tmp_path / "x.json", tmp_path / "x.png"
    ops = ("--op", "linear,dx,lora,training,multi_lora")
    assert run(*SMALL, *ops, "--rank", "8", "--json", target, "--plot", picture) == 0
    out = capsys.readouterr().out
    document = json.loads(target.read_text())
    assert document["threads"] == torch.get_num_threads()
    assert document["versions"]["torch"] == torch.__version__
    assert [(c["name"], c["M"], c["R"]) for c in document["cases"]] == [
        (name, M, rank)
        for name, rank in (("linear", 0), ("dx", 0), ("lora", 8), ("training", 8), ("multi_lora", 8))
        for M in (1, 5)
    ]  # fmt: skip
    for case in document["cases"]:
        assert (case["N"], case["K"], case["dtype"], case["device"]) == (64, 128, "float32", "cpu")
        peers = {"torch"} if case["name"] == "multi_lora" else set(bench.PEERS)
        assert case["providers"].keys() == {bench.OURS} | peers
        for name, result in case["providers"].items():
            assert 0 < result["q1_ms"] <= result["median_ms"] <= result["q3_ms"], name
            assert result["rounds"] >= bench.PASSES
    for op in bench.OPS.values():
        assert op.title in out
    rows = [line.split() for line in out.splitlines() if line.startswith("5 ")]
    assert len(rows) == 5
    ours, theirs, ratio = rows[0][1:4]
    assert float(theirs) / float(ours) == pytest.approx(float(ratio.rstrip("x")), rel=0.1, abs=0.1)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 5_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.png"]


def test_columns_for_instruction_sets_and_backends(tmp_path, capsys):
    isas = lk.backends.isas()
    ran = []
    op = bench.OPS["linear"]

    def ours(case):
        ran.append((lk.backends.isa(), lk.backends.active()))
        return op.ours(case)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.OPS, "linear", bench.Op(op.title, op.op, ours, op.peers))
        choice = ("--isa", ",".join(isas), "--backend", "reference", "--peers", "none", "--m", "2")
        assert run(*SMALL, *choice, "--op", "linear", "--json", tmp_path / "x.json") == 0
    active = lk.backends.active()
    assert ran == [*((isa, active) for isa in isas), (lk.backends.isa(), "reference")]
    [case] = json.loads((tmp_path / "x.json").read_text())["cases"]
    names = [f"{bench.OURS}, {name}" for name in (*isas, "reference")]
    assert list(case["providers"]) == names
    assert all(result["median_ms"] > 0 for result in case["providers"].values())
    assert lk.backends.isa() == isas[0] and lk.backends.active() == active, "as it was"
    assert all(name in capsys.readouterr().out for name in names[:1])


def test_a_wrong_result_is_not_timed(monkeypatch, capsys):
    right = bench.OPS["linear"]

    def twice(case):
        return [lambda call=call: 2 * call() for call in right.ours(case)]

    wrong = bench.Op(right.title, right.op, twice, {"torch": right.peers["torch"]})
    monkeypatch.setitem(bench.OPS, "linear", wrong)
    assert run(*SMALL, "--op", "linear") == 1
    out = capsys.readouterr().out
    assert f"{bench.OURS}: wrong result: relative error 1" in out
    assert out.count("failed") == 2


def test_what_is_not_installed_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert run(*SMALL, "--op", "linear,training") == 0
    out = capsys.readouterr().out
    assert "\nbitsandbytes: bitsandbytes: " in out and "\ntorch: peft: " in out


def test_in_bfloat16_and_with_one_thread(tmp_path, set_threads):
    choice = ("--dtype", "bfloat16,float32", "--threads", "1", "--op", "linear", "--hot")
    assert run(*SMALL, *choice, "--json", tmp_path / "x.json") == 0
    document = json.loads((tmp_path / "x.json").read_text())
    assert document["threads"] == 1
    assert [(c["dtype"], c["cache"]) for c in document["cases"]] == [
        (dtype, "hot") for dtype in ("bfloat16", "bfloat16", "float32", "float32")
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--isa", "sse9"), "--isa: "),
        (("--backend", "cuda9"), "--backend: "),
        (("--json", "no/such/folder/x.json"), "expected an existing folder"),
    ],
)
def test_problems(arguments, words):
    with pytest.raises(cli.UserError, match=words):
        run(*SMALL, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(cli.UserError, match="torch finds no CUDA device"):
        run(*SMALL, "--device", "cuda")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--shape", "4096"),
        ("--shape", "0x64"),
        ("--m", "0"),
        ("--m", "1,x"),
        ("--op", "conv"),
        ("--peers", "ggml"),
        ("--seconds", "-1"),
        ("--seconds", "nan"),
        ("more",),
    ],
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", *arguments])
    assert end.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_away_from_the_checkout(tmp_path):
    """The package alone, as it is installed: no bench/ beside it."""
    package = pathlib.Path(lk.__file__).parent
    (tmp_path / package.name).symlink_to(package)
    done = subprocess.run(
        [sys.executable, "-m", "lowrank_kernels", "bench", *SMALL, "--op", "linear"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "linear: y = x Wᵀ; 64 x 128" in done.stdout
