"""LowRankConfig under transformers: quantizing as it loads, saving, training, errors. docs/transformers.md."""

from __future__ import annotations

import copy
import json
import os
import pathlib
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowrank_kernels as lk
import markdown_blocks
from lowrank_kernels.interop import transformers_hook

transformers = pytest.importorskip("transformers", reason="an optional dependency")
pytest.importorskip("accelerate", reason="transformers needs it for device maps")
bnb = pytest.importorskip("bitsandbytes", reason="what is compared with")

import tiny_models  # noqa: E402
from tiny_models import MODELS, auto, files, logits, save  # noqa: E402

HERE = pathlib.Path(__file__).parent
# A folder with the oldest supported transformers; `make test` makes one.
OLDEST = os.environ.get("LOWRANK_TRANSFORMERS_OLDEST")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The folder of one of tiny_models' models."""
    folders: dict[str, pathlib.Path] = {}

    def folder(name: str) -> pathlib.Path:
        if name not in folders:
            folders[name] = save(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return folder


def load(folder, name: str = "llama", config: lk.LowRankConfig | None = None, **kwargs):
    kwargs.setdefault("dtype", "auto")
    return auto(name).from_pretrained(
        folder, quantization_config=config or lk.LowRankConfig(), **kwargs
    )


def layers(model, kind=lk.Linear4bit) -> dict[str, torch.nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, kind)}


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
    dense_there = {
        n: p for n, p in original.named_parameters() if n.rpartition(".")[0] not in quantized
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtype_and_settings(dense, dtype, tmp_path):
    config = lk.LowRankConfig(
        "fp4", 128, False, torch.bfloat16, ["v_proj", "layers.1.mlp", "lm_h.*"]
    )
    model = load(dense("llama"), config=config, dtype=dtype)
    assert config.to_dict() == {
        "quant_method": "lowrank_kernels", "quant_type": "fp4", "blocksize": 128, "double_quant": False,
        "quant_storage": "bfloat16", "skip_modules": ["v_proj", "layers.1.mlp", "lm_h.*"],
        "save_as": "lowrank_kernels",
    }  # fmt: skip
    assert {p.dtype for p in model.parameters()} == {dtype, torch.bfloat16}
    quantized = layers(model)
    # A name with a start in the middle of the path is none.
    assert len(quantized) == 12 and "model.layers.1.mlp.up_proj" in quantized
    for layer in quantized.values():
        w = layer.weight4bit
        assert (w.quant_type, w.blocksize, w.double_quant, w.dtype) == ("fp4", 128, False, dtype)
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


def test_weights_that_no_file_has(dense):
    """A head that is new: initialised, then quantized like the others; its bias is no leftover memory."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        dense("bert"), quantization_config=lk.LowRankConfig(skip_modules=[]), dtype=torch.float32
    )
    pooler, classifier = model.bert.pooler.dense, model.classifier
    for layer in (pooler, classifier):
        assert isinstance(layer, lk.Linear4bit) and not layer.bias.any()
        assert 0.01 < layer.dequantize().std() < 0.03
    assert logits(model).isfinite().all()


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


# -- the model -------------------------------------------------------------------------------------


def test_what_a_user_asks_of_a_model(dense, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # not installed
    model = load(dense("llama"), dtype=torch.float32)
    assert model.is_quantized and model.is_loaded_in_4bit
    assert model.get_memory_footprint() == sum(
        t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]
    )
    trainable = model.num_parameters(only_trainable=True)
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for cast in (model.half, model.float):
        with pytest.raises(ValueError, match="not supported for quantized model"):
            cast()
    want = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), want)
        assert copied.num_parameters.args[0] is copied.hf_quantizer.model is copied
    assert model.generate(tiny_models.TOKENS[:, :4], max_new_tokens=3, do_sample=False).shape == (
        2,
        7,
    )
    packed = {name: layer.weight.clone() for name, layer in layers(model).items()}
    assert model.to(torch.bfloat16) is model and logits(model).dtype == torch.bfloat16
    for name, layer in layers(model).items():
        assert torch.equal(layer.weight, packed[name])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_dequantize(dense, name, tmp_path):
    model = load(dense(name), name, dtype=torch.float32)
    want, quantized = logits(model), layers(model)
    weights = {name: layer.dequantize() for name, layer in quantized.items()}
    assert model.dequantize() is model and not layers(model)
    for key, weight in weights.items():
        assert type(model.get_submodule(key)) is torch.nn.Linear
        assert torch.equal(model.get_parameter(f"{key}.weight"), weight)
    torch.testing.assert_close(logits(model), want)
    assert not model.is_quantized and not hasattr(model, "is_loaded_in_4bit")
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert not hasattr(model.config, "quantization_config")
    assert model.half() is model


@pytest.mark.parametrize(
    "device_map", [None, "cpu", "auto", {"": "cpu"}, {"": torch.device("cpu")}]
)
def test_device_maps(dense, device_map):
    model = load(dense("llama"), device_map=device_map, low_cpu_mem_usage=True)
    if not torch.cuda.is_available():
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert torch.equal(logits(model), logits(load(dense("llama"))))


def test_offloading_is_refused(dense, tmp_path):
    for other in ("disk", 0):
        device_map = {"model": "cpu", "lm_head": other}
        with pytest.raises(ValueError, match="device_map: expected all modules on GPUs, or all"):
            load(dense("llama"), device_map=device_map, offload_folder=tmp_path)


def test_sharded_files(dense, tmp_path):
    model = load(dense("mixtral"), "mixtral")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert torch.equal(logits(again), logits(model))


# -- saving for bitsandbytes -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "neox", "gpt2", "bert"])
def test_save_as_bitsandbytes(dense, name, tmp_path):
    """Stock transformers and bitsandbytes load it, without a word of ours."""
    skip = ["lm_head", "cls", "embed_out", "layers.0"]
    config = lk.LowRankConfig(skip_modules=skip, save_as="bitsandbytes")
    model = load(dense(name), name, config)
    assert config.bitsandbytes is None, "the user's object is as it was"
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "bitsandbytes" and saved["bnb_4bit_compute_dtype"] == "bfloat16"
    theirs = auto(name).from_pretrained(tmp_path, dtype="auto")
    linears = layers(theirs, bnb.nn.Linear4bit)
    assert linears.keys() == layers(model).keys()
    for key, layer in linears.items():
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(weight, model.get_submodule(key).dequantize()), key


# -- training --------------------------------------------------------------------------------------


def step(model, optimizer) -> float:
    loss = model(tiny_models.TOKENS, labels=tiny_models.TOKENS).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def test_replace_linear_on_a_loaded_model(dense, tmp_path):
    model = load(dense("llama"), dtype=torch.float32)
    bytes_before = {name: layer.weight.clone() for name, layer in layers(model).items()}
    assert not model.hf_quantizer.is_qat_trainable
    report = lk.replace_linear(model, r=4, progress=False)
    assert len(report.replaced) == 14 and model.hf_quantizer.is_qat_trainable
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = [step(model, optimizer) for _ in range(4)]
    assert losses[-1] < losses[0]
    for name, layer in layers(model, lk.LoRALinear4bit).items():
        assert torch.equal(layer.weight, bytes_before[name])
    lk.save_adapter(model, tmp_path)
    other = load(dense("llama"), dtype=torch.float32)
    lk.replace_linear(other, r=4, progress=False)
    lk.load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(ValueError, match=r"dequantize: model\.layers\.0.*without adapters"):
        model.dequantize()


@pytest.mark.slow
def test_trainer(dense, tmp_path):
    """Trainer refuses a 4-bit model without adapters, and takes one with ours."""
    data = [{"input_ids": row, "labels": row} for row in tiny_models.TOKENS]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        report_to=[],
        use_cpu=True,
        learning_rate=1e-2,
        save_strategy="no",
    )
    model = load(dense("llama"), dtype=torch.float32)
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model, arguments, train_dataset=data)
    lk.replace_linear(model, r=4, progress=False)
    result = transformers.Trainer(model, arguments, train_dataset=data).train()
    assert result.global_step == 2
    assert any(layer.lora_B["default"].weight.any() for layer in layers(model).values())


def test_peft_prepares_counts_and_saves_only_the_adapter(dense, tmp_path):
    peft = pytest.importorskip("peft", reason="an optional dependency")
    model = load(dense("llama"), config=lk.LowRankConfig(quant_storage="bfloat16"))
    total = model.num_parameters()
    model = peft.prepare_model_for_kbit_training(model)
    assert model.is_gradient_checkpointing and model.lm_head.weight.dtype == torch.float32
    assert all(layer.weight.dtype == torch.bfloat16 for layer in layers(model).values())
    model.add_adapter(peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not (tmp_path / "model.safetensors").exists()
    assert model.num_parameters() - model.num_parameters(only_trainable=True) == total
    other = load(dense("llama"), config=lk.LowRankConfig(quant_storage="bfloat16"))
    other = peft.prepare_model_for_kbit_training(other)
    other.load_adapter(str(tmp_path))
    assert torch.equal(logits(other.eval()), logits(model.eval()))


def test_an_adapter_whose_base_is_quantized(dense, tmp_path):
    """from_pretrained on an adapter's folder loads the base that it names, with its config, then the adapter."""
    peft = pytest.importorskip("peft", reason="an optional dependency")
    base = load(dense("llama"))
    base.save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    model.add_adapter(peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype="auto")
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(base))


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quant_type": "int4"}, "quant_type: expected 'nf4' or 'fp4', got 'int4'"),
        ({"quant_type": None}, "quant_type: expected 'nf4' or 'fp4', got None"),
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
    names = markdown_blocks.run(
        "docs/transformers.md", {"path": dense("llama"), "bnb_path": "theirs"}
    )
    assert len(layers(names["model"])) == 14
    assert files(tmp_path / "out") == files(tmp_path / "theirs")


# -- import and versions ---------------------------------------------------------------------------

ORDERS = {
    "ours first": "import lowrank_kernels, sys; assert not {'transformers', 'peft', 'triton'} & set(sys.modules)\n"
    "import transformers.quantizers.auto, transformers",
    "ours last": "import transformers, transformers.modeling_utils, lowrank_kernels",
    "asked for": "import lowrank_kernels\nlowrank_kernels.LowRankConfig\nimport transformers",
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
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
    low, high = transformers_hook.TESTED
    text = (HERE.parent / "pyproject.toml").read_text()
    assert text.count(f'"transformers>={low},<{high}"') == text.count('"transformers') == 2
    monkeypatch.setattr(transformers_hook, "version", lambda: high + ".0")
    quantizer = sys.modules["lowrank_kernels.interop.transformers_quantizer"]
    monkeypatch.setattr(quantizer, "version", transformers_hook.version)
    with pytest.warns(UserWarning, match=f"tested with transformers >= {low}, < {high}, not with"):
        load(dense("llama"))
    monkeypatch.setattr(transformers_hook, "version", lambda: "4.57.1")
    with pytest.raises(
        ImportError, match=r"LowRankConfig: expected transformers >= .*got 4\.57\.1"
    ):
        lk.LowRankConfig  # noqa: B018
    monkeypatch.setitem(sys.modules, "lowrank_kernels.interop.transformers_quantizer", None)
    transformers_hook.register(transformers.quantizers.auto)  # does not touch it


@pytest.mark.skipif(
    not OLDEST, reason="LOWRANK_TRANSFORMERS_OLDEST names no folder; make test makes one"
)
@pytest.mark.slow
def test_the_oldest_version():
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([OLDEST, str(HERE.parent)]),
        "LOWRANK_TRANSFORMERS_OLDEST": "",
    }
    names = ("test_transformers.py", "test_transformers_bitsandbytes.py")
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
    assert found.startswith(transformers_hook.TESTED[0] + ".")
