"""``quantize`` interrupted, out of space, and on models and folders that are not what they should be."""

from __future__ import annotations

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank_kernels.cli as cli
from lowrank_kernels import files
from lowrank_kernels.cli import checkpoint
from lowrank_kernels.cli.quantize import STATE
from test_cli_quantize import ROOT, contents, edit, llama, quantize, refused, tensors_of

transformers = pytest.importorskip("transformers", reason="quantize builds models of transformers")

__all__ = ["llama"]  # a fixture


@pytest.fixture
def copy(llama, tmp_path) -> pathlib.Path:
    """The model, to be spoilt."""
    return pathlib.Path(shutil.copytree(llama, tmp_path / "copy"))


def leftovers(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- interrupted -------------------------------------------------------------------------------------

SHARDS = ("--max-shard-size", "15KB")


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(llama, out, *SHARDS)
    return contents(out)


# The command, but its second shard is never finished: no signal comes too late. Where this test runs in a shell's
# background, the command inherits that SIGINT is ignored, so it asks for Python's own handler again.
STUCK = """
import signal, sys, time
from lowrank_kernels import cli
from lowrank_kernels.cli import checkpoint

finish, finished = checkpoint.Writer.finish, []

def finish_one(self):
    if finished:
        time.sleep(300)
    finish(self)
    finished.append(self)

checkpoint.Writer.finish = finish_one
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.main(["quantize", *sys.argv[1:]])
"""


def interrupted(llama: pathlib.Path, out: pathlib.Path, number: int) -> tuple[int, str]:
    """Exit status and errors of a run that got ``number`` after it had finished one shard."""
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(llama), str(out), *SHARDS],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    state = out.with_name("out.partial") / STATE
    deadline = time.monotonic() + 120
    try:
        while not state.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_goes_on(llama, tmp_path, whole, number):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    status, errors = interrupted(llama, out, number)
    assert status == (130 if number == signal.SIGINT else -number), errors
    if number == signal.SIGINT:
        assert errors.strip().splitlines()[-1] == "interrupted; --resume goes on"
    done = json.loads((partial / STATE).read_text())["shards"]
    assert len(done) == 1 and not out.exists()
    times = {name: (partial / name).stat().st_mtime_ns for name in done}
    assert "--resume goes on" in refused(llama, out, *SHARDS)
    assert "another options" in refused(llama, out, *SHARDS, "--resume", "--blocksize", "32")
    quantize(llama, out, *SHARDS, "--resume")
    assert contents(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in done} == times, "not written again"
    assert leftovers(tmp_path) == ["out"]


def stop_at_the_end(monkeypatch, *arguments: object) -> None:
    """A run with all shards that is interrupted before OUT takes its name."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(files, "publish", interrupt)
        cli.main(["quantize", *map(str, arguments)])
    assert end.value.code == 130


def test_resume_of_nothing_and_of_a_shard_that_is_cut(llama, tmp_path, whole, monkeypatch):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    stop_at_the_end(monkeypatch, llama, out, *SHARDS)
    shard = sorted(partial.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    (partial / ".x.safetensors.writing").write_text("of a process that was killed")
    quantize(llama, out, *SHARDS, "--resume")
    assert contents(out) == whole
    quantize(llama, tmp_path / "new", *SHARDS, "--resume")
    assert contents(tmp_path / "new") == whole


def test_resume_of_a_run_that_ended_just_before_its_end(llama, tmp_path, whole):
    quantize(llama, tmp_path / "out", *SHARDS)
    (tmp_path / "out" / STATE).write_text("{}")
    quantize(llama, tmp_path / "out", *SHARDS, "--resume")
    assert contents(tmp_path / "out") == whole


def test_resume_refuses_another_source(copy, tmp_path, monkeypatch):
    stop_at_the_end(monkeypatch, copy, tmp_path / "out")
    os.utime(copy / checkpoint.SINGLE, ns=(0, 0))
    assert "another source" in refused(copy, tmp_path / "out", "--resume")
    quantize(copy, tmp_path / "out", "--force")
    assert leftovers(tmp_path) == ["copy", "out"]


def test_two_at_a_time(llama, tmp_path):
    import fcntl

    partial = tmp_path / "out.partial"
    partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert "another process" in refused(llama, tmp_path / "out", "--resume")
    assert "another process" in refused(llama, tmp_path / "out", "--force")
    os.close(descriptor)


def test_a_full_disk(llama, tmp_path):
    """Played by a limit on the size of a file, which the system refuses to pass as it does on a full disk."""
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        assert "File too large" in refused(llama, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert leftovers(tmp_path) == ["out.partial"]
    assert leftovers(tmp_path / "out.partial") == []
    quantize(llama, out, "--resume")
    assert leftovers(tmp_path) == ["out"]


def test_too_little_space_is_found_before(llama, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "MiB are needed" in refused(llama, tmp_path / "out")
    assert leftovers(tmp_path) == []


# -- where it goes -----------------------------------------------------------------------------------


def test_out_exists(llama, tmp_path):
    out = tmp_path / "out"
    quantize(llama, out)
    (out / "mine.txt").write_text("x")
    before = contents(out)
    assert "--force replaces it" in refused(llama, out)
    assert contents(out) == before
    bad = pathlib.Path(shutil.copytree(llama, tmp_path / "bad"))
    (bad / checkpoint.SINGLE).write_bytes(b"\0" * 100)
    refused(bad, out, "--force")
    assert contents(out) == before, "a run that fails replaces nothing"
    quantize(llama, out, "--force", "--blocksize", "32")
    assert "mine.txt" not in contents(out) and contents(out) != before
    assert leftovers(tmp_path) == ["bad", "out"]


def test_replacing_where_names_cannot_be_exchanged(llama, tmp_path, monkeypatch):
    quantize(llama, tmp_path / "out")
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    quantize(llama, tmp_path / "out", "--force", "--blocksize", "32")
    assert leftovers(tmp_path) == ["out"]


def test_places_that_are_refused(copy, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("x")
    before = contents(tmp_path)
    assert "no config.json" in refused(copy, home, "--force")
    for out in (copy, copy / "inside", tmp_path):
        assert "apart from MODEL" in refused(copy, out, "--force")
    assert "existing folder" in refused(copy, tmp_path / "no" / "out")
    assert "existing folder" in refused(
        copy, tmp_path / "out", "--report", tmp_path / "no" / "r.json"
    )
    (tmp_path / "link").symlink_to(home)
    assert "not a folder" in refused(copy, tmp_path / "link", "--force")
    (tmp_path / "link").unlink()
    assert contents(tmp_path) == before


# -- models that are none ----------------------------------------------------------------------------


def test_folders_without_a_dense_model(llama, copy, tmp_path):
    assert "got none" in refused("no/such-model", tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no config.json" in refused(empty, tmp_path / "out")
    (empty / "config.json").write_text("[1]")
    assert "JSON object" in refused(empty, tmp_path / "out")
    (empty / "config.json").write_text('{"model_type": "llama"}')
    assert "got none" in refused(empty, tmp_path / "out")
    (empty / "pytorch_model.bin").write_bytes(b"")
    assert "pickle" in refused(empty, tmp_path / "out")
    (empty / "model.gguf").write_bytes(b"GGUF")
    assert "a GGUF file" in refused(empty, tmp_path / "out")
    quantize(llama, tmp_path / "4bit")
    assert "in 4 bits already" in refused(tmp_path / "4bit", tmp_path / "out")
    (tmp_path / "4bit" / "config.json").write_bytes((llama / "config.json").read_bytes())
    assert "in 4 bits already" in refused(tmp_path / "4bit", tmp_path / "out")
    edit(copy / "config.json", quantization_config={"quant_method": "gptq"})
    assert "quantized already (quant_method 'gptq'" in refused(copy, tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(model_type="no-such-model"), "cannot build"),
        (dict(architectures=["NoSuchModel"]), "no model 'NoSuchModel'"),
        (dict(architectures=["os"]), "no model 'os'"),
        (dict(model_type="new", auto_map={"AutoConfig": "modeling_evil.C"}), "cannot build"),
        (dict(num_attention_heads="many"), "cannot build"),
        (dict(intermediate_size=100), "expected shape (64, 100) by config.json"),
    ],
)
def test_configurations(copy, tmp_path, fields, words):
    edit(copy / "config.json", **fields)
    assert words in refused(copy, tmp_path / "out")
    assert leftovers(tmp_path) == ["copy"]


def spoil_cut(folder):
    data = (folder / checkpoint.SINGLE).read_bytes()
    (folder / checkpoint.SINGLE).write_bytes(data[: len(data) // 2])


def spoil_header(folder):
    data = (folder / checkpoint.SINGLE).read_bytes()
    (folder / checkpoint.SINGLE).write_bytes(b"\xff" * 8 + data[8:])


def spoil_nan(folder):
    tensors = load_file(folder / checkpoint.SINGLE)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / checkpoint.SINGLE, {"format": "pt"})


def spoil_type(folder):
    tensors = load_file(folder / checkpoint.SINGLE)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / checkpoint.SINGLE, {"format": "pt"})


def spoil_index(**weight_map):
    return lambda folder: (folder / checkpoint.INDEX).write_text(
        json.dumps({"weight_map": weight_map})
    )


def spoil_pickle(folder):
    torch.save({"model.norm.weight": torch.zeros(3)}, folder / checkpoint.SINGLE)


def spoil_link(folder):
    (folder / "vocab.txt").symlink_to("/etc/hostname")


def spoil_count(folder):
    (folder / checkpoint.SINGLE).rename(folder / "model-00001-of-00002.safetensors")


def spoil_twice(folder):
    (folder / checkpoint.SINGLE).rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_cut, "model.safetensors: "),
        (spoil_header, "model.safetensors: "),
        (spoil_pickle, "model.safetensors: "),
        (spoil_nan, "model.layers.1.mlp.up_proj.weight: weight: expected finite values, got nan"),
        (spoil_type, "model.norm.weight is F8_E4M3"),
        (spoil_index(a="../copy/model.safetensors"), "names of .safetensors files in the folder"),
        (spoil_index(a="/etc/passwd"), "names of .safetensors files in the folder"),
        (spoil_index(a=["model.safetensors"]), "names of .safetensors files in the folder"),
        (spoil_index(), "expected a weight_map"),
        (spoil_index(a="model.safetensors"), "a is not in model.safetensors"),
        (spoil_index(a="gone.safetensors"), "gone.safetensors"),
        (spoil_count, "expected 2 shards, got 1"),
        (spoil_twice, "is in a.safetensors and b.safetensors"),
        (spoil_link, "a link out of the folder"),
    ],
)  # fmt: skip
def test_files_that_are_corrupt_or_lie(copy, tmp_path, spoil, words):
    spoil(copy)
    assert words in refused(copy, tmp_path / "out")
    assert "out" not in leftovers(tmp_path)
    shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
    assert leftovers(tmp_path) == ["copy"]


def test_a_model_of_the_hubs_cache(llama, tmp_path):
    """Its files are links to where the cache keeps them."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in llama.iterdir():
        if path.is_file():
            shutil.copy(path, blobs / path.name)
            (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    quantize(snapshot, tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() > {"lm_head.weight"}
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


@pytest.mark.parametrize(
    "arguments",
    [
        ["only-one"],
        ["a", "b", "--blocksize", "48"],
        ["a", "b", "--max-shard-size", "5"],
        ["a", "b", "--quant-type", "nf3"],
    ],
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["quantize", *arguments])
    assert end.value.code == 2
    assert "usage:" in capsys.readouterr().err


ODD = [None, [1], {"a": 1}, "x", -1, True, 1e300, "\x00\n", 10**30]
FIELDS = ("torch_dtype", "dtype", "architectures", "model_type", "hidden_size", "vocab_size",
          "num_hidden_layers", "tie_word_embeddings", "rope_parameters", "quantization_config")  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_no_configuration_ends_in_a_traceback(copy, tmp_path, capsys):
    """One line for each, or a result; never another exception."""
    original = (copy / "config.json").read_text()
    for field in FIELDS:
        for value in ODD:
            document = json.loads(original) | {field: value}
            (copy / "config.json").write_text(json.dumps(document))
            try:
                cli.main(["quantize", str(copy), str(tmp_path / "out"), "--quiet", "--force"])
            except SystemExit as end:
                lines = str(end.code).splitlines()
                assert end.code == 0 or (len(lines) == 1 and lines[0].startswith("lowrank_")), field
    for raw in (b"\xff\xfe", b"[" * 100_000, b"", b"{", b'{"a":' * 5000):
        (copy / "config.json").write_bytes(raw)
        assert "config.json" in refused(copy, tmp_path / "out", "--force")


@pytest.mark.parametrize("count", [10**5, 10**30])
def test_a_model_far_larger_than_its_files(copy, tmp_path, count):
    edit(copy / "config.json", num_hidden_layers=count, layer_types=None)
    words = refused(copy, tmp_path / "out")
    assert "far larger model" in words or "expected at most 1000000" in words


def test_the_root_folder_as_out(llama):
    assert "expected the name of a folder" in refused(llama, "/")
