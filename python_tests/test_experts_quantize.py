"""``quantize`` of mixtures of experts: the checkpoint that from_pretrained makes as it quantizes, expert by expert."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank_kernels as lk
import lowrank_kernels.cli as cli
from lowrank_kernels.pieces import quantize_pieces

transformers = pytest.importorskip("transformers", reason="quantize builds models of transformers")

from tiny_experts import CONFIGS, dense, logits, stacks  # noqa: E402 (needs transformers)

pytestmark = pytest.mark.filterwarnings("ignore")


def quantize(*arguments: object) -> str | int | None:
    with pytest.raises(SystemExit) as end:
        cli.main(["quantize", *map(str, arguments)])
    return end.value.code


def load(folder: pathlib.Path, **options: object) -> torch.nn.Module:
    """Nothing may be missing or left over."""
    cls = transformers.AutoModelForCausalLM
    model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    return model.eval()


def tensors_of(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    return {k: t for p in sorted(folder.glob("*.safetensors")) for k, t in load_file(p).items()}


@pytest.fixture
def saved(tmp_path) -> pathlib.Path:
    """A Qwen3-MoE as checkpoints on the hub are: a matrix for each expert and projection."""
    dense("qwen3_moe").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder: pathlib.Path, change) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def stack_in_place(folder: pathlib.Path) -> None:
    """The same model with stacks in its files."""

    def change(tensors):
        for layer in (0, 1):
            start = f"model.layers.{layer}.mlp.experts"
            gate, up, down = (
                torch.stack([tensors.pop(f"{start}.{e}.{name}_proj.weight") for e in range(8)])
                for name in ("gate", "up", "down")
            )
            tensors[f"{start}.gate_up_proj"] = torch.cat([gate, up], 1)
            tensors[f"{start}.down_proj"] = down

    edit(folder, change)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_bytes_are_those_of_from_pretrained(name, tmp_path):
    dense(name).save_pretrained(tmp_path / "model")
    assert quantize(tmp_path / "model", tmp_path / "out", "--quiet") == 0
    model = load(tmp_path / "out")
    expected = load(tmp_path / "model", quantization_config=lk.LowRankConfig())
    found, wanted = stacks(model), stacks(expected)
    assert found.keys() == wanted.keys() and found
    for key, stack in wanted.items():
        for entry, tensor in stack.weight4bit.to_bitsandbytes(key).items():
            assert torch.equal(found[key].weight4bit.to_bitsandbytes(key)[entry], tensor), entry
    assert torch.equal(logits(model), logits(expected))


def test_stacks_in_the_files_become_the_same(saved, tmp_path):
    assert quantize(saved, tmp_path / "a", "--quiet") == 0
    stack_in_place(saved)
    assert quantize(saved, tmp_path / "b", "--quiet") == 0
    a, b = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(logits(load(tmp_path / "b")), logits(load(tmp_path / "a")))


def test_the_report_counts_experts(saved, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert quantize(saved, tmp_path / "out", "--report", report, "--dtype", "bfloat16") == 0
    rows = {row["name"]: row for row in json.loads(report.read_text())["quantized"]}
    name = "model.layers.1.mlp.experts.gate_up_proj"
    W = dense("qwen3_moe").get_parameter(name).detach().bfloat16()
    w = lk.quantize_4bit(W)
    error = (w.dequantize(torch.float32) - W.float()).norm() / W.float().norm()
    assert rows[name]["shape"] == [8, 128, 64] and rows[name]["bytes_before"] == 4 * W.numel()
    assert rows[name]["bytes_after"] == sum(t.nbytes for t in w.to_bitsandbytes().values())
    assert rows[name]["error"] == pytest.approx(float(error), rel=1e-4)
    out, errors = capsys.readouterr()
    assert f"{name}  8 x 128 x 64" in " ".join(out.split()).replace(f"{name} ", f"{name}  ")
    assert "stays dense" not in errors


@pytest.mark.parametrize(
    "options", [("--quant-type", "int4"), ("--quant-storage", "bfloat16", "--no-double-quant")]
)
def test_options(saved, tmp_path, options):
    assert quantize(saved, tmp_path / "out", "--quiet", *options) == 0
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "lowrank_kernels"
    given = {k: config[k] for k in ("quant_type", "blocksize", "double_quant", "quant_storage")}
    expected = load(saved, quantization_config=lk.LowRankConfig(**given))
    assert torch.equal(logits(load(tmp_path / "out")), logits(expected))


def test_experts_alone(saved, tmp_path):
    assert (
        quantize(saved, tmp_path / "out", "--quiet", "--target-modules", "experts.down_proj") == 0
    )
    model = load(tmp_path / "out")
    assert len(stacks(model)) == 4
    assert not any(isinstance(m, lk.Linear4bit) for m in model.modules())


def test_one_layer_is_excluded(saved, tmp_path):
    arguments = ["--exclude", "lm_head", "layers.0.mlp.experts"]
    assert quantize(saved, tmp_path / "out", "--quiet", *arguments) == 0
    model = load(tmp_path / "out")
    assert {name.rpartition(".")[0] for name in stacks(model)} == {"model.layers.1.mlp.experts"}
    experts = model.model.layers[0].mlp.experts
    assert torch.equal(experts.down_proj, dense("qwen3_moe").model.layers[0].mlp.experts.down_proj)


def test_shards_and_resume(saved, tmp_path, monkeypatch):
    """Experts of a stack may lie in any shard of the source; an interrupted run ends in the same bytes."""
    dense("qwen3_moe").save_pretrained(saved, max_shard_size="60KB")
    (saved / "model.safetensors").unlink(missing_ok=True)
    assert len(list(saved.glob("*.safetensors"))) > 5
    shards = ["--quiet", "--max-shard-size", "40KB"]
    assert quantize(saved, tmp_path / "whole", *shards) == 0
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 3
    before, count = cli.quantize._Run._quantize_stack, []

    def interrupted(self, stack, bar):
        count.append(stack)
        if len(count) == 3:
            raise KeyboardInterrupt
        return before(self, stack, bar)

    monkeypatch.setattr(cli.quantize._Run, "_quantize_stack", interrupted)
    assert quantize(saved, tmp_path / "out", *shards) == 130
    monkeypatch.undo()
    assert quantize(saved, tmp_path / "out", *shards, "--resume") == 0
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    load(tmp_path / "out")


def _lose_one(tensors):
    del tensors["model.layers.0.mlp.experts.5.down_proj.weight"]


def _lose_up(tensors):
    del tensors["model.layers.0.mlp.experts.5.up_proj.weight"]


def _cut(tensors):
    key = "model.layers.0.mlp.experts.5.down_proj.weight"
    tensors[key] = tensors[key][:, :32].contiguous()


def _spoil(tensors):
    tensors["model.layers.1.mlp.experts.5.up_proj.weight"][3, 7] = torch.nan


@pytest.mark.parametrize(
    "change, message",
    [
        (_lose_one, "expected 8 experts by config.json, got 7"),
        (_lose_up, "expected as many tensors of each kind, got [8, 7]"),
        (_cut, "experts.5.down_proj.weight: expected an expert of shape (64, 64) by config.json, got (64, 32)"),
        (_spoil, "experts.gate_up_proj: weight: expected finite values, got nan at index (5, 67, 7)"),
    ],
)  # fmt: skip
def test_files_that_are_not_those_of_the_model(saved, tmp_path, change, message):
    edit(saved, change)
    assert message in str(quantize(saved, tmp_path / "out", "--quiet"))
    assert not (tmp_path / "out").exists()


def test_experts_in_other_dtypes_stay_dense(saved, tmp_path):
    def change(tensors):
        key = "model.layers.0.mlp.experts.5.down_proj.weight"
        tensors[key] = tensors[key].to(torch.bfloat16)

    edit(saved, change)
    report = tmp_path / "report.json"
    assert quantize(saved, tmp_path / "out", "--quiet", "--report", report) == 0
    skipped = {x["name"]: x["reason"] for x in json.loads(report.read_text())["skipped"]}
    assert skipped["model.layers.0.mlp.experts"] == "stored in several dtypes"
    assert len(stacks(load(tmp_path / "out"))) == 2


# -- piece by piece --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 6, 24), (3, 5, 7), (2, 64, 64), (8, 33, 65)])
@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("double_quant", [False, True])
def test_pieces_have_the_bytes_of_the_whole(shape, blocksize, double_quant):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    for storage in (torch.uint8, torch.bfloat16):
        settings = "nf4", blocksize, double_quant, storage
        pieces = quantize_pieces(iter(W), W.shape, W.dtype, *settings).to_bitsandbytes()
        whole = lk.quantize_4bit(W, *settings).to_bitsandbytes()
        assert pieces.keys() == whole.keys()
        for key, tensor in whole.items():
            assert pieces[key].shape == tensor.shape and pieces[key].dtype == tensor.dtype
            flat = (t.reshape(-1).view(torch.uint8) for t in (pieces[key], tensor))
            assert torch.equal(*flat), key


def test_pieces_that_do_not_make_the_whole():
    W = torch.randn(3, 8, 8)
    with pytest.raises(ValueError, match="pieces: expected 256 elements in all, got 192"):
        quantize_pieces(iter(W), (4, 8, 8), W.dtype)
    with pytest.raises(ValueError, match="pieces: expected 128 elements in all, got more"):
        quantize_pieces(iter(W), (2, 8, 8), W.dtype)
    W[2, 3, 4] = torch.inf
    with pytest.raises(ValueError, match=r"got inf at index \(2, 3, 4\)"):
        quantize_pieces(W.flatten().split(50), W.shape, W.dtype)
