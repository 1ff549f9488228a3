"""LowRankConfig under transformers: quantizing as it loads, errors, versions. docs/transformers.md."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowrank_kernels as lk
from lowrank_kernels.interop import transformers_hook, transformers_version

transformers = pytest.importorskip("transformers", reason="an optional dependency")
pytest.importorskip("accelerate", reason="transformers needs it for device maps")
bnb = pytest.importorskip("bitsandbytes", reason="what is compared with")
safetensors = pytest.importorskip("safetensors.torch")

import markdown_blocks  # noqa: E402
import tiny_experts  # noqa: E402
import tiny_models  # noqa: E402
from lowrank_kernels.interop import transformers_load  # noqa: E402
from tiny_models import MODELS, auto, files, layers, load, logits, save  # noqa: E402

dense = tiny_models.dense
HERE = pathlib.Path(__file__).parent
# A folder with the oldest supported transformers; `make test` makes one.
OLDEST = os.environ.get("LOWRANK_TRANSFORMERS_OLDEST")


# -- quantizing on the fly -------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_layers_and_weights(dense, name, tmp_path):
    """The layers that bitsandbytes has in 4 bits, with the weights of quantize_4bit; the rest unchanged."""
    folder = dense(name)
    model, original = load(folder, name), auto(name).from_pretrained(folder, dtype="auto")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    theirs = auto(name).from_pretrained(folder, quantization_config=config, dtype="auto")
    quantized = layers(model)
    assert list(quantized) == list(layers(theirs, bnb.nn.Linear4bit)) != []
    for key, layer in quantized.items():
        source = original.get_submodule(key)
        weight = source.weight if isinstance(source, torch.nn.Linear) else source.weight.T
        want = lk.quantize_4bit(weight.contiguous())
        assert layer.weight4bit.dtype == torch.bfloat16
        for field, tensor in want.tensors().items():
            assert torch.equal(getattr(layer.weight4bit, field), tensor), (key, field)
        source.weight.copy_(want.dequantize().view_as(weight) if weight is source.weight
                            else want.dequantize().T)  # fmt: skip
    stacks = {
        f"{path}.{key}": stack
        for path, module in model.named_modules()
        if isinstance(module, lk.Experts4bit)
        for key, stack in module.stacks.items()
    }
    assert bool(stacks) == (name == "mixtral")  # which bitsandbytes leaves dense
    for key, stack in stacks.items():
        source, want = original.get_parameter(key), stack.weight4bit
        assert torch.equal(lk.quantize_4bit(source).packed, want.packed)
        source.copy_(want.dequantize())
    dense_there = {
        n: p
        for n, p in original.named_parameters()
        if n.rpartition(".")[0] not in quantized and n not in stacks
    }
    for key, parameter in dense_there.items():
        assert torch.equal(model.get_parameter(key), parameter), key
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert model.num_parameters() == original.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == original.num_parameters(
        exclude_embeddings=True
    )
    torch.testing.assert_close(logits(model), logits(original), rtol=0.05, atol=0.05)

    model.save_pretrained(tmp_path / "saved")
    again = auto(name).from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model)) and layers(again).keys() == quantized.keys()
    again.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "saved")


@pytest.mark.parametrize(("dtype", "quant_type"), [(torch.float32, "fp4"), (torch.float16, "int4")])
def test_dtype_and_settings(dense, dtype, quant_type, tmp_path):
    config = lk.LowRankConfig(
        quant_type, 128, False, torch.bfloat16, ["v_proj", "layers.1.mlp", "lm_h.*"]
    )
    model = load(dense("llama"), config=config, dtype=dtype)
    assert config.to_dict() == {
        "quant_method": "lowrank_kernels", "quant_type": quant_type, "blocksize": 128, "double_quant": False,
        "quant_storage": "bfloat16", "skip_modules": ["v_proj", "layers.1.mlp", "lm_h.*"],
        "save_as": "lowrank_kernels",
    }  # fmt: skip
    assert {p.dtype for p in model.parameters()} == {dtype, torch.bfloat16}
    quantized = layers(model)
    # A name with a start in the middle of the path is none.
    assert len(quantized) == 12 and "model.layers.1.mlp.up_proj" in quantized
    for layer in quantized.values():
        w = layer.weight4bit
        settings = (w.quant_type, w.blocksize, w.double_quant, w.dtype)
        assert settings == (quant_type, 128, False, dtype)
        assert w.packed.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert lk.LowRankConfig.from_dict(saved).to_dict() == config.to_dict()
    for other in (dtype, torch.float32):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=other)
        for key, layer in layers(again).items():
            mine, theirs = layer.weight.view(torch.uint8), quantized[key].weight.view(torch.uint8)
            assert torch.equal(mine, theirs), key
        assert {p.dtype for p in again.parameters()} == {other, torch.bfloat16}
        assert logits(again).dtype == other


class Live(TorchDispatchMode):
    """The most bytes that tensors made under it held at one time."""

    def __init__(self):
        super().__init__()
        self.storages, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.storages:
                    self.storages[key] = size
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.freed, key)
        return out

    def freed(self, key):
        self.now -= self.storages.pop(key)


def test_never_all_of_the_dense_model(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=256, intermediate_size=512, num_hidden_layers=12,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    size = 4 * model.num_parameters()  # in float32, which it is cast to
    model.save_pretrained(tmp_path)
    del model
    with Live() as live:
        load(tmp_path, dtype=torch.float32)
    assert size / 8 < live.peak < size / 8 + 16 * 512 * 256, (live.peak, size)


def test_weights_that_no_file_has(dense, tmp_path):
    """A head that is new stays dense, since somebody has to train it, and is saved so."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        dense("bert"), quantization_config=lk.LowRankConfig(skip_modules=[]), dtype=torch.float32
    )
    for layer in (model.bert.pooler.dense, model.classifier):
        assert type(layer) is torch.nn.Linear and layer.weight.requires_grad
        assert 0.01 < layer.weight.std() < 0.03 and not layer.bias.any()
    why = {layer.name: layer.reason for layer in model.hf_quantizer.skipped}
    assert why["classifier"] == why["bert.pooler.dense"] == "not in the checkpoint"
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model)) and logits(model).isfinite().all()


@torch.no_grad()
def test_a_bias_that_no_file_has(tmp_path):
    """Initialised by transformers, not what the memory held."""
    folder = save("neox", tmp_path)
    tensors = safetensors.load_file(folder / "model.safetensors")
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.bias"
    del tensors[name]
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        model = load(folder, "neox")
    finally:
        torch.use_deterministic_algorithms(False)
    assert not model.get_parameter(name).any() and logits(model).isfinite().all()


def test_what_stays_dense_whatever_the_list_says(dense):
    everything = lk.LowRankConfig(skip_modules=[])
    assert "lm_head" in layers(load(dense("llama"), config=everything))
    assert "lm_head" not in layers(load(dense("tied"), "tied", everything))
    assert not [n for n in layers(load(dense("t5"), "t5", everything)) if n.endswith("wo")]


def test_tensor_parallelism_is_refused():
    weight = torch.randn(64, 64)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        layer = torch.nn.Linear(64, 64)
        layer.weight = torch.nn.Parameter(torch.distributed.tensor.distribute_tensor(weight, mesh))
        model = torch.nn.Sequential(layer)
        with pytest.raises(
            ValueError, match=r"0\.weight: 4-bit weights cannot be loaded with tensor"
        ):
            transformers_load._install(model, "0.weight", lk.quantize_4bit(weight), ())
        assert model[0] is layer
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(dense, value, tmp_path, caplog):
    model = transformers.AutoModelForCausalLM.from_pretrained(dense("llama"))
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    model.save_pretrained(tmp_path)
    transformers.utils.logging.enable_propagation()
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        load(tmp_path)
    transformers.utils.logging.disable_propagation()
    assert "model.layers.1.mlp.up_proj.weight: weight: expected finite" in caplog.text


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quant_type": "int3"}, "quant_type: expected one of .*'int4'.*, got 'int3'"),
        ({"quant_type": None}, "quant_type: expected one of .*, got None"),
        (
            {"quant_type": "int4", "save_as": "bitsandbytes"},
            "quant_type: expected one of .* in a checkpoint for bitsandbytes, got 'int4'",
        ),
        ({"blocksize": 100}, "blocksize: expected one of"),
        ({"blocksize": "64"}, "blocksize: expected one of"),
        ({"double_quant": 1}, "double_quant: expected True or False, got 1"),
        ({"quant_storage": "int8"}, "quant_storage: expected one of .*'uint8'.*, got 'int8'"),
        ({"quant_storage": torch.int8}, "quant_storage: expected one of .*, got torch.int8"),
        ({"skip_modules": "lm_head"}, "skip_modules: expected a list of strings, got 'lm_head'"),
        ({"skip_modules": [1]}, "skip_modules: expected a list of strings"),
        ({"save_as": "gptq"}, "save_as: expected one of .*, got 'gptq'"),
        ({"quant_method": "gptq"}, "quant_method: expected 'lowrank_kernels', got 'gptq'"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lk.LowRankConfig(**arguments)
    with pytest.raises(ValueError, match=message):
        lk.LowRankConfig.from_dict(arguments)


def test_a_field_of_another_version():
    with pytest.raises(TypeError, match="fancy"):
        lk.LowRankConfig.from_dict({"quant_method": "lowrank_kernels", "fancy": 1})


# -- docs ------------------------------------------------------------------------------------------


def test_the_page(dense, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load(dense("llama"), config=lk.LowRankConfig(save_as="bitsandbytes")).save_pretrained("theirs")
    tiny_experts.save_gpt_oss(tmp_path / "gpt-oss")
    paths = {"path": dense("llama"), "bnb_path": "theirs", "gpt_oss_path": tmp_path / "gpt-oss"}
    names = markdown_blocks.run("docs/transformers.md", paths)
    assert len(layers(names["model"])) == 14
    assert files(tmp_path / "out") == files(tmp_path / "theirs")


# -- import and versions ---------------------------------------------------------------------------

ORDERS = {
    "ours first": "import lowrank_kernels, sys; assert not {'transformers', 'peft', 'triton'} & set(sys.modules)\n"
    "import transformers.quantizers.auto, transformers",
    "ours last": "import transformers, transformers.modeling_utils, lowrank_kernels",
    "asked for": "import lowrank_kernels\nlowrank_kernels.LowRankConfig\nimport transformers",
}


@pytest.mark.parametrize(
    "order",
    [next(iter(ORDERS)), *(pytest.param(o, marks=pytest.mark.slow) for o in list(ORDERS)[1:])],
)
def test_registered_in_either_order(dense, order, tmp_path):
    load(dense("llama")).save_pretrained(tmp_path)
    program = ORDERS[order] + (
        "\nimport sys; model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
        "\nprint(type(model.model.layers[0].mlp.up_proj).__module__)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "lowrank_kernels.linear4bit\n", done.stderr


def test_versions(dense, monkeypatch):
    """The range of pyproject.toml is the one that the code knows; outside it, it says so."""
    low, high = transformers_version.TESTED
    text = (HERE.parent / "pyproject.toml").read_text()
    assert text.count(f'"transformers>={low},<{high}"') == text.count('"transformers') == 2
    monkeypatch.setattr(transformers_version, "version", lambda: high + ".0")
    with pytest.warns(UserWarning, match=f"tested with transformers >= {low}, < {high}, not with"):
        load(dense("llama"))
    monkeypatch.setattr(transformers_version, "version", lambda: "4.57.1")
    with pytest.raises(
        ImportError, match=r"LowRankConfig: expected transformers >= .*got 4\.57\.1"
    ):
        lk.LowRankConfig  # noqa: B018
    monkeypatch.setitem(sys.modules, "lowrank_kernels.interop.transformers_quantizer", None)
    transformers_hook.register(transformers.quantizers.auto)  # does not touch it


def test_without_transformers(monkeypatch):
    """It is named, with the versions that do, also where packaging is missing, which is no dependency of ours."""
    monkeypatch.setitem(sys.modules, "packaging", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "packaging.version", raising=False)
    low, high = transformers_version.TESTED
    message = (
        f"LowRankConfig: expected transformers >= {low}, < {high}, got none: it is not installed"
    )
    with pytest.raises(ImportError, match=message) as error:
        lk.LowRankConfig  # noqa: B018
    assert error.value.name == "transformers"


@pytest.mark.skipif(
    not OLDEST, reason="LOWRANK_TRANSFORMERS_OLDEST names no folder; make test makes one"
)
@pytest.mark.slow
def test_the_oldest_version():
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([OLDEST, str(HERE.parent)]),
        "LOWRANK_TRANSFORMERS_OLDEST": "",
    }
    kinds = "test_transformers*.py", "test_experts*.py"
    names = [path.name for kind in kinds for path in sorted(HERE.glob(kind))]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-qxm",
        "not slow",
        *(str(HERE / name) for name in names),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    version = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    found = subprocess.run(version, capture_output=True, text=True, env=environment).stdout
    assert found.startswith(transformers_version.TESTED[0] + ".")
