"""Adapter files in PEFT's format, both ways with real PEFT; and PEFT's own adapters on Linear4bit."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
    offload_wrapper,
)

import lowrank_kernels as lk
from lowrank_kernels import adapter_format
from lowrank_kernels.adapter_files import load_adapter, save_adapter
from lowrank_kernels.nn import Linear4bit, LoRALinear4bit
from lowrank_kernels.replace import replace_linear
from tolerance import assert_same_bits

WHY = "the files must be read and written by the real PEFT"
TOKENS = torch.arange(20).view(2, 10)
Q0 = "model.layers.0.self_attn.q_proj"


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the model of these tests")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def pair(**arguments) -> tuple[nn.Module, nn.Module]:
    """(a model with adapters that do something, the plain model with the same base weights)."""
    model = llama()
    plain = copy.deepcopy(model)
    replace_linear(model, progress=False, **({"r": 4, "lora_alpha": 8} | arguments))
    for name, layer in lora_layers(model).items():
        plain.get_submodule(name).weight.data.copy_(layer.dequantize())
        for adapter in layer.r:
            nn.init.normal_(layer.lora_B[adapter].weight, std=0.05)
    return model, plain


def lora_layers(model: nn.Module) -> dict[str, LoRALinear4bit]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear4bit)}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def assert_same_outputs(a: nn.Module, b: nn.Module) -> None:
    assert torch.allclose(logits(a), logits(b), rtol=1e-4, atol=1e-5)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert_same_bits(key, after[key], value)


def config_of(path) -> dict:
    return json.loads((path / "adapter_config.json").read_text())


# -- with real PEFT --------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
def test_our_files_load_in_peft(tmp_path, use_rslora):
    peft = pytest.importorskip("peft", reason=WHY)
    model, plain = pair(target_modules=["q_proj", "v_proj", "gate_proj"], use_rslora=use_rslora)
    model.config.name_or_path = "tiny/llama"
    save_adapter(model, tmp_path / "deep" / "adapter")
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "deep" / "adapter")
    assert_same_outputs(model, theirs)
    with theirs.disable_adapter():
        assert (logits(theirs) - logits(model)).abs().max() > 1e-2  # the adapter matters
    config = config_of(tmp_path / "deep" / "adapter")
    assert config["target_modules"] == ["gate_proj", "q_proj", "v_proj"]
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "tiny/llama")
    assert sorted(p.name for p in (tmp_path / "deep" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_layers_that_differ_load_in_peft(tmp_path):
    peft = pytest.importorskip("peft", reason=WHY)
    model, plain = pair(target_modules=["q_proj"])
    replace_linear(model, ["v_proj"], r=8, lora_alpha=3, progress=False)
    replace_linear(model, ["layers.1.mlp.down_proj"], r=4, lora_alpha=5, progress=False)
    for name, layer in lora_layers(model).items():
        plain.get_submodule(name).weight.data.copy_(layer.dequantize())
        nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    save_adapter(model, tmp_path)
    config = config_of(tmp_path)
    assert config["rank_pattern"] == {
        f"^model\\.layers\\.{i}\\.self_attn\\.v_proj": 8 for i in (0, 1)
    }
    assert len(config["alpha_pattern"]) == 3 and config["lora_alpha"] == 8
    assert "model.layers.1.mlp.down_proj" in config["target_modules"]  # down_proj of layer 0 is not
    assert_same_outputs(model, peft.PeftModel.from_pretrained(plain, tmp_path))

    other, _ = pair(target_modules=["q_proj", "v_proj", "down_proj"])
    replaced = lora_layers(other)
    for name, layer in lora_layers(model).items():
        replaced[name]._set_weight4bit(layer.weight4bit)
    load_adapter(other, tmp_path)
    assert other.model.layers[0].mlp.down_proj.r == {}  # had one, is not in the file
    assert replaced[Q0].r == {"default": 4} and replaced[Q0].scaling == {"default": 2.0}
    for name, layer in lora_layers(model).items():
        assert replaced[name].scaling == layer.scaling
        assert_same_bits(
            name, replaced[name].lora_B["default"].weight, layer.lora_B["default"].weight
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.25},
        {"target_modules": r".*\.(q|o)_proj", "use_rslora": True, "init_lora_weights": "gaussian"},
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"^model.layers.1.mlp\..*": 5},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 16, "(up|down)_proj": 1},
        },
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    ],
    ids=["list", "regex", "patterns", "some_layers"],
)
def test_peft_files_load_here(tmp_path, settings):
    peft = pytest.importorskip("peft", reason=WHY)
    model, plain = pair(r=3)
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)
    theirs = peft.get_peft_model(plain, config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(tmp_path)
    load_adapter(model, tmp_path, "new")
    assert_same_outputs(model, theirs)
    layer = lora_layers(model)["model.layers.1.self_attn.q_proj"]
    assert layer.active_adapter == "new" and layer.lora_A["new"].weight.requires_grad
    assert not layer.lora_A["default"].weight.requires_grad
    assert layer.lora_dropout["new"] == settings.get("lora_dropout", 0.0)

    save_adapter(model, tmp_path / "again", "new")  # byte for byte the same tensors
    first, second = (
        load_file(p / "adapter_model.safetensors") for p in (tmp_path, tmp_path / "again")
    )
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert_same_bits(key, second[key], tensor)


def test_peft_adapters_on_linear4bit_and_their_files(tmp_path):
    """PEFT wraps Linear4bit; what it saves loads into LoRALinear4bit, and a wrapped model loads too."""
    peft = pytest.importorskip("peft", reason=WHY)
    base = llama()
    replace_linear(base, r=0, progress=False)
    model = copy.deepcopy(base)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", r=4)).eval()
    lora = wrapped.base_model.model.get_submodule(Q0)
    assert isinstance(lora.base_layer, Linear4bit) and lora.lora_A["default"].in_features == 64
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    wrapped.save_pretrained(tmp_path / "peft")
    replace_linear(model, r=2, progress=False)
    load_adapter(model, tmp_path / "peft")
    assert_same_outputs(model, wrapped)

    # LoRALinear4bit inside a PEFT wrapper: the paths in the file are those of the model.
    both = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(target_modules=["embed_tokens"])
    )
    save_adapter(both, tmp_path / "both")
    assert config_of(tmp_path / "both")["task_type"] == "CAUSAL_LM"
    a, b = (load_file(tmp_path / p / "adapter_model.safetensors") for p in ("peft", "both"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    load_adapter(both, tmp_path / "peft", "again")
    assert both.base_model.model.get_submodule(Q0).active_adapter == "again"


@pytest.mark.parametrize("use_dora", [False, True])
def test_peft_trains_adapters_on_linear4bit(use_dora):
    peft = pytest.importorskip("peft", reason=WHY)
    four = llama()
    replace_linear(four, r=0, progress=False)
    dense = llama()
    for name, module in four.named_modules():
        if isinstance(module, Linear4bit):
            dense.get_submodule(name).weight.data.copy_(module.dequantize())
        elif name and isinstance(getattr(module, "weight", None), nn.Parameter):
            dense.get_submodule(name).weight.data.copy_(module.weight)
    config = peft.LoraConfig(
        target_modules=["q_proj", "down_proj"], r=4, use_dora=use_dora, init_lora_weights=False
    )
    models = []
    for model in (four, dense):
        torch.manual_seed(7)
        models.append(peft.get_peft_model(model, config))
    for model in models:
        model(TOKENS, labels=TOKENS).loss.backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in models]
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 2 * 2 * (3 if use_dora else 2)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-3, atol=1e-5), name
    assert_same_outputs(*models)


def test_peft_knows_the_packed_parameters():
    peft = pytest.importorskip("peft", reason=WHY)
    model = llama()
    dense_count = sum(p.numel() for p in model.parameters())
    replace_linear(model, r=0, quant_storage=torch.bfloat16, progress=False)
    before = snapshot(model)
    model.is_loaded_in_4bit = True
    peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert_unchanged(model, before)  # it upcasts every other 16-bit parameter
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=4))
    trainable, total = wrapped.get_nb_trainable_parameters()
    assert total - trainable == dense_count


# -- our own round trip ----------------------------------------------------------------------------


def test_loading_keeps_parameters_and_replaces_values(tmp_path):
    model, _ = pair()
    expected = logits(model)
    save_adapter(model, tmp_path)
    layers = lora_layers(model)
    parameters = {n: m.lora_A["default"].weight for n, m in layers.items()}
    for layer in layers.values():
        nn.init.normal_(layer.lora_B["default"].weight)
        layer.add_adapter("other", r=2)
        layer.set_adapter("other")
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), expected)
    for name, layer in layers.items():
        assert layer.lora_A["default"].weight is parameters[name]  # an optimizer still holds it
        assert layer.lora_A["default"].weight.requires_grad and "other" in layer.r
    save_adapter(model, tmp_path)  # over the old files
    load_adapter(model, tmp_path, "copy")
    assert torch.equal(logits(model), expected)


def test_short_names_paths_or_a_regex(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = nn.ModuleDict({"a": nn.Linear(8, 8), "c": nn.Linear(8, 8)})

    def target_modules(*targets):
        net = Net()
        replace_linear(net, "|".join(targets), r=2, progress=False)
        save_adapter(net, tmp_path)
        load_adapter(net, tmp_path, "again")
        return config_of(tmp_path)["target_modules"]

    assert target_modules("a", r"b\.a") == ["a"]
    assert target_modules(r"b\.a", r"b\.c") == ["b.a", "b.c"]
    assert target_modules("a") == "a"  # the list ["a"] would take b.a too


def test_save_errors(tmp_path):
    model, _ = pair(target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"name: expected an adapter .*\['default'\], got 'x'"):
        save_adapter(model, tmp_path / "new", "x")
    lora_layers(model)[Q0].lora_dropout["default"] = 0.5
    with pytest.raises(ValueError, match="name: expected one lora_dropout in all layers"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# -- files that are refused ------------------------------------------------------------------------

KEY = f"base_model.model.{Q0}.lora_A.weight"


def _tensors(change):
    def write(path):
        tensors = load_file(path / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, path / "adapter_model.safetensors")

    return write


def _config(**fields):
    def write(path):
        (path / "adapter_config.json").write_text(json.dumps(config_of(path) | fields))

    return write


def _raw(name, text):
    return lambda path: (path / name).write_bytes(text)


def _other(name):
    return _tensors(lambda t: t.update({f"base_model.model.{Q0}.{name}": torch.zeros(4, 64)}))


def _header_twice(path):
    """One key twice in the header of a safetensors file, for two readers to take two tensors."""
    entry = {"dtype": "F32", "shape": [4, 64], "data_offsets": [0, 1024]}
    header = f'{{"{KEY}": {json.dumps(entry)}, "{KEY}": {json.dumps(entry)}}}'.encode()
    data = len(header).to_bytes(8, "little") + header + bytes(1024)
    (path / "adapter_model.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_tensors(lambda t: t.pop(KEY)), f"{KEY}: expected it, got none"),
        (_tensors(lambda t: t.update({KEY: t[KEY][:, 1:].clone()})), r"lora_A.* = \(4, 64\).* \(4, 63\)"),
        (_tensors(lambda t: t.update({KEY: t[KEY].double()})), "lora_A.*float16, got F64"),
        (_tensors(lambda t: t.update({"x.weight": t[KEY].clone()})), "x.weight: expected a key base_"),
        (
            _tensors(lambda t: t.update({KEY.replace("q_proj", "qq"): t[KEY].clone()})),
            "self_attn.qq: expected a LoRALinear4bit .* got no such module",
        ),
        (
            _tensors(lambda t: t.update({KEY.replace("q_proj", "k_proj"): t[KEY].clone()})),
            "self_attn.k_proj: expected a LoRALinear4bit .* got a Linear",
        ),
        (_tensors(lambda t: t.clear()), "expected at least one layer, got no tensors"),
        (_raw("adapter_model.safetensors", b"\x08\0\0\0\0\0\0\0garbage!"), "expected a safetensors"),
        (_raw("adapter_config.json", b"{"), "adapter_config.json: expected JSON"),
        (_raw("adapter_config.json", b"[" * 100_000), "adapter_config.json: expected JSON"),
        (_raw("adapter_config.json", b"[]"), "expected a JSON object, got list"),
        (_config(r=5), r"\[r, in_features\] = \(5, 64\) with r from adapter_config.json, got \(4, 64\)"),
        (_config(rank_pattern={"q_proj": 3}), r"lora_A.* = \(3, 64\)"),
        (_config(rank_pattern={"q_proj": 0}), "rank_pattern: expected an object of integers"),
        (_config(rank_pattern={"(": 4}), "rank_pattern: expected regular expressions"),
        (_config(alpha_pattern={"q_proj": float("nan")}), "alpha_pattern: expected .* finite numbers"),
        (_config(lora_alpha=float("inf")), "lora_alpha: expected a finite number, got inf"),
        (_config(lora_alpha=10**400), "lora_alpha: expected a finite number, got 1000"),
        (_config(lora_alpha="8"), "lora_alpha: expected a finite number, got '8'"),
        (_config(lora_dropout=1.5), r"lora_dropout: expected a number in \[0, 1\), got 1.5"),
        (_config(use_rslora=1), "use_rslora: expected true or false, got 1"),
        (_config(peft_type="IA3"), "peft_type: expected 'LORA', got 'IA3'"),
        (_config(peft_type=None), "peft_type: expected 'LORA', got None"),
        (_config(use_dora=True), "use_dora: expected it unset"),
        (_tensors(lambda t: t[KEY].fill_(float("nan"))), f"{KEY}: expected finite numbers, got a NaN"),
        (_tensors(lambda t: t[KEY][0, 0].fill_(-float("inf"))), f"{KEY}: expected finite numbers"),
        (_tensors(lambda t: t.update({KEY: torch.zeros(0, 64)})), r"\(4, 64\) .* got \(0, 64\)"),
        (_tensors(lambda t: t.update({KEY: t[KEY].char()})), "lora_A.*float16, got I8"),
        (_tensors(lambda t: t.update({KEY: t[KEY][None].clone()})), r"a matrix, got \(1, 4, 64\)"),
        (_other("lora_B.bias"), "got a trained bias of an adapter .lora_bias., which is not supp"),
        (_other("lora_embedding_A"), "got an adapter of an embedding, which"),
        (_other("lora_magnitude_vector.weight"), "got DoRA, which is not supported"),
        (_other("modules_to_save.weight"), "got a module that was trained whole"),
        (_other("weight"), r"got a module that was saved whole \(modules_to_save, or save_embedding_l"),
        (_other("bias"), "got a trained bias of the model"),
        (_other("ia3_l"), "got another name"),
        (_config(r=2**31 - 1), r"\(2147483647, 64\) with r from adapter_config.json, got \(4, 64\)"),
        (_config(r=2**31), "r: expected an integer >= 1"),
        (_config(r=True), "r: expected an integer >= 1, got True"),
        (_config(r=4.0), "r: expected an integer >= 1, got 4.0"),
        (_config(rank_pattern={"q_proj": True}), "rank_pattern: expected an object of integers"),
        (_config(lora_alpha=True), "lora_alpha: expected a finite number, got True"),
        (_config(lora_dropout=False), r"lora_dropout: expected a number in \[0, 1\), got False"),
        (_raw("adapter_config.json", b'{"r": 4, "r": 8}'), "JSON: the name 'r' comes twice"),
        (_header_twice, "expected a safetensors file: the name 'base_model.* comes twice"),
        (_config(modules_to_save=["lm_head"]), "modules_to_save: expected null or a list"),
        (_config(a_field_of_the_future=1), "a_field_of_the_future: expected it unset"),
        (_config(bias="all"), "bias: expected 'none'"),
        (_config(init_lora_weights="pissa"), "init_lora_weights: expected .* got 'pissa'"),
        (_config(target_modules=["v_proj"]), r"expected a layer of target_modules .*got model.layers"),
        (_config(target_modules="(q"), "target_modules: expected regular expressions"),
    ],
)  # fmt: skip
def test_a_bad_file_changes_nothing(tmp_path, damage, message):
    model, _ = pair(target_modules=["q_proj"])
    save_adapter(model, tmp_path)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B["default"].weight)
    before = snapshot(model)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, tmp_path)
    assert str(tmp_path) in str(error.value)  # the file is named
    assert_unchanged(model, before)
    assert lora_layers(model)[Q0].active_adapter == "default"


def test_missing_files_pickles_and_states(tmp_path):
    model, _ = pair(target_modules=["q_proj"])
    with pytest.raises(FileNotFoundError, match=r"got '.*' without adapter_config.json"):
        load_adapter(model, tmp_path)
    save_adapter(model, tmp_path)
    for name in ("", "a.b", 3, "training"):
        with pytest.raises(ValueError, match="name: expected a non-empty string without"):
            load_adapter(model, tmp_path, name)
    layer = lora_layers(model)[Q0]
    layer.merge()
    with pytest.raises(RuntimeError, match=r"q_proj is merged; call unmerge\(\) first"):
        load_adapter(model, tmp_path, "new")
    layer.unmerge()
    assert all("new" not in other.r for other in lora_layers(model).values())
    layer.to("meta")
    with pytest.raises(ValueError, match="expected a layer with data, got one on the meta device"):
        load_adapter(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"pickled weights are not read.* without adapter_model"
    ):
        load_adapter(model, tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    from lowrank_kernels import adapter_files

    model, _ = pair(target_modules=["q_proj"])
    save_adapter(model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full_disk(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(adapter_files, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_adapter(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# -- wrapped models --------------------------------------------------------------------------------


def _each_block(wrap):
    def wrapped(model):
        for i, block in enumerate(model.model.layers):
            model.model.layers[i] = wrap(block)
        return model

    return wrapped


def _peft(model):
    peft = pytest.importorskip("peft", reason=WHY)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))


WRAPPERS = {
    "compile": torch.compile,
    "data_parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "compiled_blocks": _each_block(torch.compile),
    "checkpointed_blocks": _each_block(checkpoint_wrapper),
    "offloaded_blocks": _each_block(offload_wrapper),
    "peft": _peft,
    "several": lambda m: torch.compile(
        nn.DataParallel(_peft(_each_block(lambda b: torch.compile(checkpoint_wrapper(b)))(m)))
    ),
}


@pytest.mark.filterwarnings("ignore:save_adapter")  # PEFT's adapter of lm_head trains
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_names_of_wrappers_never_enter_files(tmp_path, wrap):
    model, _ = pair(target_modules=["q_proj", "down_proj"])
    replace_linear(model, ["layers.0.mlp.up_proj"], r=4, lora_alpha=3, progress=False)
    save_adapter(model, tmp_path / "bare")
    wrapped = wrap(copy.deepcopy(model))
    save_adapter(wrapped, tmp_path / "wrapped")
    files = [tmp_path / name for name in ("bare", "wrapped")]
    assert config_of(files[0]) == config_of(files[1])
    tensors = [load_file(path / "adapter_model.safetensors") for path in files]
    assert tensors[0].keys() == tensors[1].keys()
    load_adapter(model, files[1], "again")
    load_adapter(wrapped, files[0], "again")
    assert list(lk.adapters(wrapped)["again"].layers) == list(lk.adapters(model)["again"].layers)
    bank = lk.AdapterBank.for_model(wrapped, num_pages=2)
    assert bank.module_names == tuple(lora_layers(model))
    bank.load("file", files[0])


def test_a_layer_called_module_keeps_its_name(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.ModuleDict({"model": nn.Linear(8, 8)})

    net = Net()
    replace_linear(net, r=2, progress=False)
    save_adapter(nn.DataParallel(net), tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert keys == {f"base_model.model.module.model.lora_{x}.weight" for x in "AB"}


def test_marks_in_a_file_are_read(tmp_path):
    """Files that were saved from a model with compiled blocks, by others or by an older version."""
    model, _ = pair(target_modules=["q_proj"])
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    marked = {key.replace("layers.0", "layers.0._orig_mod"): t for key, t in tensors.items()}
    save_file(marked, path)
    load_adapter(model, tmp_path, "marked")
    layer = lora_layers(model)[Q0]
    assert torch.equal(layer.lora_A["marked"].weight, layer.lora_A["default"].weight)
    save_file(marked | {key: t.clone() for key, t in tensors.items()}, path)
    with pytest.raises(ValueError, match=r"expected one key for .*layers\.0.*, got .* too"):
        load_adapter(model, tmp_path)


# -- what was trained and is not in the file -------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        (f"{Q0}.bias", f"{Q0}.bias"),
        (f"{Q0}.lora_A.other.weight", "adapter 'other'"),
    ],
)
def test_a_warning_names_what_trains_and_is_not_saved(tmp_path, name, named):
    model, _ = pair(target_modules=["q_proj"])
    lora_layers(model)[Q0].add_adapter("other", r=2)
    lora_layers(model)[Q0].bias = nn.Parameter(torch.zeros(64), requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path)
    model.get_parameter(name).requires_grad_(True)
    with pytest.warns(
        UserWarning, match=f"not in the file of adapter 'default'.*: {named}\\. "
    ) as w:
        save_adapter(model, tmp_path)
    assert w[0].filename == __file__
    with pytest.warns(UserWarning, match=f": {named}\\. "):
        save_adapter(torch.compile(model), tmp_path)


# -- files from strangers --------------------------------------------------------------------------


def test_nothing_is_read_before_every_size_is_checked(tmp_path, monkeypatch):
    """A file whose last tensor is wrong costs the memory of none of them."""
    model, _ = pair(target_modules=["q_proj"])
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    last = sorted(tensors)[-1]
    save_file(tensors | {last: torch.zeros(64, 5)}, path)

    def read(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(adapter_format, "_read_finite", read)
    with pytest.raises(ValueError, match=r"\(64, 4\) .* got \(64, 5\)"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("lora_alpha", [0, -3, 0.5])
def test_any_finite_alpha_is_taken(tmp_path, lora_alpha):
    """0 switches an adapter off and a negative one takes away what it learnt: both are meant."""
    model, plain = pair(target_modules=["q_proj"])
    save_adapter(model, tmp_path)
    _config(lora_alpha=lora_alpha)(tmp_path)
    load_adapter(model, tmp_path)
    assert lora_layers(model)[Q0].scaling == {"default": lora_alpha / 4}
    peft = pytest.importorskip("peft", reason=WHY)
    assert_same_outputs(model, peft.PeftModel.from_pretrained(plain, tmp_path))


def test_a_state_dict_is_checked_as_a_file_is():
    model, _ = pair(target_modules=["q_proj"])
    bank = lk.AdapterBank.for_model(model, num_pages=2)
    good = {
        f"{path}.lora_{x}.weight": torch.ones(4, 64) if x == "A" else torch.ones(64, 4)
        for path in bank.module_names
        for x in "AB"
    }
    short = KEY.removeprefix("base_model.model.")
    nan = torch.full((4, 64), float("nan"))
    for change, message in (
        ({short: nan}, f"{short}: expected finite numbers"),
        ({short: torch.ones(4, 64, device="meta")}, "expected a tensor with data, got one on the meta"),
        ({short: torch.ones(4, 64).double()}, "float16, got torch.float64"),
        ({short: [1.0]}, f"{short}: expected a matrix, got list"),
        ({short: torch.ones(5, 64)}, r"\[out_features, r\] = \(64, 5\) with r of its partner"),
        ({KEY: torch.ones(4, 64)}, "expected it once, with 'base_model.model.' or without, got both"),
        ({"lm_head.weight": torch.ones(4, 64)}, "got a module that was saved whole"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            bank.load("x", good | change)
        assert bank.free_pages == 2
    bank.load("x", good)


def test_adapters_of_conv1d(tmp_path):
    """PEFT's files of GPT-2 say fan_in_fan_out, which is about the base weight: A is [r, in] all the same."""
    peft = pytest.importorskip("peft", reason=WHY)
    transformers = pytest.importorskip("transformers", reason="the model of these tests")
    config = transformers.GPT2Config(
        vocab_size=64,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    load = transformers.GPT2LMHeadModel.from_pretrained
    ours = load(tmp_path / "base", quantization_config=lk.LowRankConfig()).eval()
    replace_linear(ours, ["c_attn", "c_fc"], progress=False)
    plain = load(tmp_path / "base").eval()
    for path, layer in lora_layers(ours).items():
        plain.get_submodule(path).weight.data.copy_(layer.dequantize().T)
    for name in plain.state_dict():
        if name.endswith("c_proj.weight"):
            layer = ours.get_submodule(name.removesuffix(".weight"))
            plain.get_submodule(name.removesuffix(".weight")).weight.data.copy_(
                layer.dequantize().T
            )
    arguments = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    theirs = peft.get_peft_model(plain, peft.LoraConfig(**arguments, init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "a")
    assert config_of(tmp_path / "a")["fan_in_fan_out"] is True
    load_adapter(ours, tmp_path / "a")
    assert_same_outputs(ours, theirs.eval())
    bank = lk.AdapterBank.for_model(ours, num_pages=2)
    bank.load("a", tmp_path / "a")
    with bank.using(bank.plan(["a"] * 2, tokens_per_sequence=[TOKENS.shape[1]] * 2)):
        assert_same_outputs(ours, theirs)
