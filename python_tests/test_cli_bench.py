"""``bench``: what it measures, its table, JSON and picture, and what it refuses."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import lowrank_kernels as lk
import lowrank_kernels.cli as cli
from lowrank_kernels.benchmark import harness, models, providers
from lowrank_kernels.benchmark.ops import OPS, OURS

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
    ops = ("--op", ",".join(OPS))
    assert run(*SMALL, *ops, "--rank", "8", "--json", target, "--plot", picture) == 0
    out, document = capsys.readouterr().out, harness.read(target)
    assert document["threads"] == torch.get_num_threads()
    assert document["versions"]["torch"] == torch.__version__
    assert [(c["op"], c["M"], c["R"]) for c in document["cases"]] == [
        (op.op, M, 8 if op.adapter else 0) for op in OPS.values() for M in (1, 5)
    ]
    for case in document["cases"]:
        assert (case["N"], case["K"], case["dtype"], case["device"]) == (64, 128, "float32", "cpu")
        many = case["op"].startswith("multi_lora")
        with_peft = " + PEFT" * case["op"].startswith("lora")
        peers = {f"torch{with_peft}", f"bitsandbytes{with_peft}", "dequantize + matmul"}
        assert set(case["providers"]) == {OURS} | ({"torch loop"} if many else peers)
        for name, result in case["providers"].items():
            assert 0 < result["q1_ms"] <= result["median_ms"] <= result["q3_ms"], name
            assert result["rounds"] >= harness.PASSES
    rows = [line.split() for line in out.splitlines() if line.split()[:1] == ["5"]]
    assert len(rows) == 5
    ours, theirs = (float(rows[0][i]) for i in (1, 3))
    ratio = float(rows[0][9].rstrip("x"))
    assert theirs / ours == pytest.approx(ratio, rel=0.1, abs=0.1)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 5_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.png"]


@pytest.fixture
def tiny(monkeypatch) -> str:
    """The name of a model with random weights that is trained in milliseconds."""
    for package in ("transformers", "peft", "bitsandbytes"):
        pytest.importorskip(package, reason="a contender of --model")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "heads": 4, "kv_heads": 2}
    monkeypatch.setitem(models.SHAPES, "tiny", sizes)
    monkeypatch.setattr(models, "VOCABULARY", 96)
    return "tiny-2"


CONTENDERS = {OURS, models.PEFT, models.FUSED, models.DENSE, models.BITSANDBYTES}


def test_a_whole_model(tiny, tmp_path, capsys):
    """Tokens per second in each phase and dtype."""
    target, picture = tmp_path / "x.json", tmp_path / "x.png"
    choice = ("--dtype", "bfloat16,float32", "--rank", "4", "--seconds", "0.001", "--medium")
    assert run("--model", tiny, *choice, "--json", target, "--plot", picture) == 0
    document, out = harness.read(target), capsys.readouterr().out
    assert [(c["phase"], c["dtype"], c["R"]) for c in document["cases"]] == [
        (phase, dtype, 4) for dtype in ("bfloat16", "float32") for phase in models.TOKENS
    ]
    for case in document["cases"]:
        medium = {f"{n}, medium" for n in CONTENDERS} if case["dtype"] == "float32" else set()
        assert set(case["providers"]) == CONTENDERS | medium
        for name, result in case["providers"].items():
            if why := result.get("unavailable"):  # named, not silently absent
                assert f"{name} did not run: {why}" in out
                continue
            rate = case["tokens"] / result["median_ms"] * 1e3
            assert result["tokens_per_second"] == pytest.approx(rate)
            assert 0 < result["q1_ms"] <= result["median_ms"] <= result["q3_ms"]
            assert result["relative_error"] < models.ROUNDED
    assert "tokens per second; tiny-2, float32, r = 4" in out and picture.stat().st_size > 5_000


def test_a_model_from_a_folder(tiny, tmp_path, capsys):
    models.random_model(tiny).save_pretrained(tmp_path / "saved")
    choice = ("--rank", "4", "--seconds", "0.001", "--peers", "none", "--threads", "1")
    assert run("--model", tmp_path / "saved", *choice) == 0
    out = capsys.readouterr().out
    assert "tokens per second; saved, float32, r = 4" in out and "bitsandbytes" not in out


def contest(
    tiny: str, *names: str, dtype: str = "float32"
) -> tuple[models.Contest, dict[str, harness.Provider]]:
    present = models.contenders(models.random_model(tiny).to(getattr(torch, dtype)), 4, names)
    made = models.Contest(present, models.random_batch(96, "cpu", 2, 16))
    return made, {name: made.provider(name) for name in present}


def results(tiny: str, providers: dict, phase: str, dtype: str = "float32") -> dict[str, dict]:
    [case] = [c for c in models.cases(tiny, dtype, 4, "cpu", 32) if c.phase == phase]
    return harness.measure(case, providers, 1e-3)


@pytest.mark.parametrize("layer", ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"])
@pytest.mark.parametrize("dtype, wrong", [
    ("float32", lambda g: 1.01 * g),
    ("float32", torch.zeros_like),
    ("bfloat16", lambda g: 1.5 * g),
    ("bfloat16", lambda g: g.flip(0)),
])  # fmt: skip
def test_training_with_a_wrong_gradient_is_not_timed(tiny, layer, dtype, wrong):
    """In one of the adapters of one contender; the others are timed."""
    made, of_case = contest(tiny, models.PEFT, models.DENSE, dtype=dtype)
    names = models.adapters(made.models[models.PEFT])
    names[f"model.{layer}.lora_A.default.weight"].register_hook(wrong)
    found = results(tiny, of_case, "train", dtype)
    assert f"wrong model.{layer}.lora_A.default.weight" in found[models.PEFT]["error"]
    assert found[OURS]["tokens_per_second"] > 0 and found[models.DENSE]["tokens_per_second"] > 0
    assert "error" not in results(tiny, of_case, "prefill", dtype)[models.PEFT]


def test_training_without_a_gradient_is_not_timed(tiny):
    made, of_case = contest(tiny, models.DENSE)
    parameter = next(iter(models.adapters(made.models[models.DENSE]).values()))
    parameter.requires_grad_(False)
    assert "1 gradients are missing" in results(tiny, of_case, "train")[models.DENSE]["error"]


def test_wrong_logits_are_not_timed(tiny):
    made, of_case = contest(tiny, models.BITSANDBYTES)
    made.models[models.BITSANDBYTES].get_base_model().lm_head.weight.data.mul_(1.5)
    for phase in models.TOKENS:
        found = results(tiny, of_case, phase)
        assert re.match("wrong (loss|logits)", found[models.BITSANDBYTES]["error"])
        assert found[OURS]["tokens_per_second"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bitsandbytes_is_not_timed_in_training_after_inference(tiny, dtype):
    """It repacks its weights in inference, and no gradient passes them from then on."""
    bnb = pytest.importorskip("bitsandbytes", reason="what is tested")
    if not bnb.functional.has_avx512bf16():
        pytest.skip("bitsandbytes repacks on CPUs with AVX512_BF16 alone")
    name = models.BITSANDBYTES
    _, of_case = contest(tiny, name, dtype=dtype)
    found = [results(tiny, of_case, phase, dtype)[name] for phase in models.TOKENS]
    assert all("error" not in result for result in found), "training was first"
    assert "lora_A.default.weight" in results(tiny, of_case, "train", dtype)[name]["error"]


def test_columns_for_instruction_sets_and_backends(tmp_path, capsys, monkeypatch):
    isas = lk.backends.isas()
    ran = []

    def ours(case):
        ran.append((lk.backends.isa(), lk.backends.active()))
        return providers.linear_lowrank(case)

    monkeypatch.setitem(OPS, "linear", dataclasses.replace(OPS["linear"], ours=ours))
    choice = ("--isa", ",".join(isas), "--backend", "reference", "--peers", "none", "--m", "2")
    assert run(*SMALL, *choice, "--op", "linear", "--json", tmp_path / "x.json") == 0
    active = lk.backends.active()
    assert ran == [*((isa, active) for isa in isas), (lk.backends.isa(), "reference")]
    [case] = harness.read(tmp_path / "x.json")["cases"]
    names = [f"{OURS}, {name}" for name in (*isas, "reference")]
    assert list(case["providers"]) == names
    assert all(result["median_ms"] > 0 for result in case["providers"].values())
    assert lk.backends.isa() == isas[0] and lk.backends.active() == active, "as it was"
    assert all(name in capsys.readouterr().out for name in names[:1])


def test_medium(tmp_path, capsys):
    """A column more for each; an instruction set without bfloat16 products has none, and that is said."""
    choice = ("--medium", "--isa", f"{lk.backends.isa()},scalar", "--op", "linear", "--m", "5")
    assert run(*SMALL, *choice, "--json", tmp_path / "x.json") == 0
    [case] = harness.read(tmp_path / "x.json")["cases"]
    assert {name for name in case["providers"] if name.endswith(", medium")} == {
        f"{name}, medium" for name in case["providers"] if not name.endswith(", medium")
    }
    why = case["providers"][f"{OURS}, scalar, medium"]["unavailable"]
    assert why in capsys.readouterr().out and "no products of bfloat16" in why
    rounds = lk.backends.products(torch.bfloat16) == torch.bfloat16
    exact, rounded = (
        case["providers"][f"{OURS}, {lk.backends.isa()}{m}"] for m in ("", ", medium")
    )
    assert exact["relative_error"] < 1e-5
    assert rounded["relative_error"] > 1e-4 if rounds else "unavailable" in rounded


def test_a_wrong_result_is_not_timed(monkeypatch, capsys):
    def twice(case):
        return [lambda call=call: 2 * call() for call in providers.linear_lowrank(case)]

    monkeypatch.setitem(OPS, "linear", dataclasses.replace(OPS["linear"], ours=twice))
    assert run(*SMALL, "--op", "linear", "--peers", "torch") == 1
    out = capsys.readouterr().out
    assert f"{OURS} failed, linear_4bit 64x128 M=1: wrong result: relative error 1" in out


def test_what_is_not_installed_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "peft", None)
    choice = ("--shape", "64x192", "--m", "1", "--op", "linear,training")  # nothing of it is cached
    assert run(*choice, "--seconds", "0.001") == 0
    out = capsys.readouterr().out
    assert "\nbitsandbytes did not run: bitsandbytes: " in out
    assert "\ntorch + PEFT did not run: peft: " in out


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
@pytest.mark.parametrize("command", ["bench", "doctor"])
def test_a_terminal_without_unicode(command, encoding):
    """What it lacks is a question mark; all commands begin in one place."""
    choice = [*SMALL, "--peers", "none", "--op", "linear"] if command == "bench" else []
    done = subprocess.run(
        [sys.executable, "-m", "lowrank_kernels", command, *choice],
        env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert command == "doctor" or b"y = x W?; W 64 x 128" in done.stdout


def test_in_bfloat16_and_with_one_thread(tmp_path, set_threads):
    choice = ("--dtype", "bfloat16,float32", "--threads", "1", "--op", "linear", "--hot")
    assert run(*SMALL, *choice, "--json", tmp_path / "x.json") == 0
    document = harness.read(tmp_path / "x.json")
    assert document["threads"] == 1
    assert [(c["dtype"], c["cache"]) for c in document["cases"]] == [
        (dtype, "hot") for dtype in ("bfloat16", "bfloat16", "float32", "float32")
    ]


@pytest.mark.parametrize("arguments, words", [
    ("--isa sse9", "--isa: "),
    ("--backend cuda9", "--backend: "),
    ("--json no/such/folder/x.json", "expected an existing folder"),
    ("--model no/such/folder", "expected a folder with a Hugging Face"),
])  # fmt: skip
def test_problems(arguments, words):
    with pytest.raises(cli.UserError, match=words):
        run(*SMALL, *arguments.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(cli.UserError, match="torch finds no CUDA device"):
        run(*SMALL, "--device", "cuda")


WRONG = (
    "--shape 4096", "--shape 0x64", "--m 0", "--m 1,x", "--op conv", "--peers ggml", "--seconds -1", "--seconds nan",
    "more",
)  # fmt: skip


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", *arguments.split()])
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
    assert "y = x Wᵀ; W 64 x 128" in done.stdout


def test_files_are_looked_at_before_anything_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "run", lambda *args: pytest.fail("timed"))
    other = tmp_path / "other.json"
    other.write_text('{"model": "mine"}')
    for option, path, words in (
        ("--json", tmp_path, "got a folder"),
        ("--plot", tmp_path, "got a folder"),
        ("--json", tmp_path / "no" / "x.json", "existing folder"),
        ("--json", other, "exists already and is no such report"),
    ):
        with pytest.raises(SystemExit, match=words):
            cli.main(["bench", option, str(path)])
    assert other.read_text() == '{"model": "mine"}'
