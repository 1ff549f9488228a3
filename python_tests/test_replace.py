"""replace_linear: which layers, what is kept, memory, the report, errors that change nothing."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from lowrank_kernels import quantize_4bit
from lowrank_kernels import replace as replace_module
from lowrank_kernels.nn import Linear4bit, LoRALinear4bit
from lowrank_kernels.replace import ReplaceReport, SkippedLayer, replace_linear

D = 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(D, D), nn.Linear(D, 32, bias=False)
        self.o_proj = nn.Linear(32, D)
        self.norm = nn.LayerNorm(D)

    def forward(self, x):
        return self.norm(x + torch.tanh(self.q_proj(x)) + self.o_proj(self.v_proj(x)))


class Model(nn.Module):
    def __init__(self, blocks: int = 2):
        super().__init__()
        self.embed = nn.Embedding(50, D)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.lm_head = nn.Linear(D, 50, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


ALL = [f"layers.{i}.{name}" for i in (0, 1) for name in ("q_proj", "v_proj", "o_proj")]
TOKENS = torch.arange(12).view(2, 6)


def kinds(model: nn.Module) -> dict[str, type]:
    return {
        name: type(m)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and "lora_" not in name
    }


def names(report: ReplaceReport) -> list[str]:
    return [layer.name for layer in report.replaced]


@pytest.mark.parametrize("r", [0, 4])
def test_all_linear(r):
    model = Model().eval()
    dense = {name: model.get_submodule(name) for name in ALL}
    report = replace_linear(
        model, r=r, lora_alpha=8, use_rslora=True, quant_type="fp4", blocksize=128, progress=False
    )
    assert names(report) == ALL
    assert report.skipped == [SkippedLayer("lm_head", "in exclude_modules")]
    for name, old in dense.items():
        new = model.get_submodule(name)
        assert type(new) is (LoRALinear4bit if r else Linear4bit)
        expected = quantize_4bit(old.weight, "fp4", 128, True)
        assert torch.equal(new.weight, expected.packed) and new.bias is old.bias
        assert new.training is False and new.weight4bit.blocksize == 128
        if r:
            assert new.scaling == {"default": 8 / 2} and new.r == {"default": r}
        with torch.no_grad():
            old.weight.copy_(expected.dequantize())
    y = model(TOKENS)  # a new adapter adds nothing
    for name, old in dense.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, old)
    assert torch.allclose(y, model(TOKENS), atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        ("all-linear", None, [*ALL, "lm_head"]),
        ("ALL-LINEAR", ("lm_head", "o_proj"), [n for n in ALL if "o_proj" not in n]),
        (["q_proj"], (), ["layers.0.q_proj", "layers.1.q_proj"]),
        (("1.q_proj", "layers.0.v_proj"), (), ["layers.0.v_proj", "layers.1.q_proj"]),
        ({"lm_head", "v_proj"}, (), ["layers.0.v_proj", "layers.1.v_proj", "lm_head"]),
        (r".*\.0\.[qv]_proj", ("lm_head",), ["layers.0.q_proj", "layers.0.v_proj"]),
        ("all-linear", r"layers\.0\..*|lm_head", ALL[3:]),
        ("q_proj|.*1.q_proj", (), ["layers.1.q_proj"]),  # a string must match the whole path
    ],
    ids=str,
)
def test_targets(targets, exclude, expected):
    model = Model()
    report = replace_linear(model, targets, exclude, r=2, progress=False)
    assert names(report) == expected
    assert [n for n, kind in kinds(model).items() if kind is LoRALinear4bit] == expected
    left = {layer.name: layer.reason for layer in report.skipped}
    assert left.keys() == {*ALL, "lm_head"} - set(expected)
    assert set(left.values()) <= {"not in target_modules", "in exclude_modules"}


def test_what_is_skipped_and_why():
    class Other(nn.Linear):
        pass

    model = Model()
    model.lm_head.weight = model.embed.weight
    model.other, model.conv = Other(D, D), nn.Conv1d(D, D, 1)
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
    model.four = Linear4bit(D, D)
    report = replace_linear(model, exclude_modules=("v_proj",), r=0, progress=False)
    assert names(report) == ["layers.0.o_proj", "layers.1.o_proj"]
    assert {layer.name: layer.reason for layer in report.skipped} == {
        "layers.0.q_proj": "weight shared with layers.1.q_proj",
        "layers.1.q_proj": "weight shared with layers.0.q_proj",
        "layers.0.v_proj": "in exclude_modules",
        "layers.1.v_proj": "in exclude_modules",
        "lm_head": "weight shared with embed",
        "other": "of type Other",
        "four": "in 4 bits already",
    }
    report = replace_linear(model, [r"o_proj", "conv", "other", "four"], r=4, progress=False)
    assert names(report) == ["layers.0.o_proj", "layers.1.o_proj", "four"]
    assert {"conv": "of type Conv1d", "other": "of type Other"}.items() <= {
        layer.name: layer.reason for layer in report.skipped
    }.items()


def test_a_4bit_layer_gains_an_adapter_and_keeps_its_bytes():
    model = Model()
    replace_linear(model, r=0, blocksize=256, progress=False)
    pointers = {name: model.get_submodule(name).weight.data_ptr() for name in ALL}
    report = replace_linear(model, r=4, blocksize=64, progress=False)
    assert names(report) == ALL
    for name, layer in zip(ALL, report.replaced, strict=True):
        new = model.get_submodule(name)
        assert type(new) is LoRALinear4bit and new.blocksize == 256
        assert new.weight.data_ptr() == pointers[name]
        assert layer.bytes_before == layer.bytes_after and layer.adapter_bytes > 0
    with pytest.raises(ValueError, match=r"layers.0.q_proj: of type LoRALinear4bit"):
        replace_linear(model, r=4, progress=False)
    assert not any("lora_" in name for name in names(report))


def test_a_layer_under_two_names_is_replaced_once():
    model = Model()
    model.alias = model.layers[1].q_proj
    model.block = model.layers[0]
    report = replace_linear(model, ["layers.1.q_proj", "v_proj"], r=2, progress=False)
    assert type(model.alias) is LoRALinear4bit and model.alias is model.layers[1].q_proj
    assert type(model.block.v_proj) is LoRALinear4bit
    assert names(report) == ["layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj"]


def test_only_adapters_train():
    model = Model()
    model.embed.weight.requires_grad_(False)
    replace_linear(model, ["q_proj"], r=0, progress=False)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "layers.0.norm.weight" in trainable and "layers.0.q_proj.bias" in trainable
    assert "embed.weight" not in trainable and "layers.0.q_proj.weight" not in trainable

    replace_linear(model, ["v_proj"], r=2, progress=False)
    replace_linear(model, ["o_proj"], r=2, progress=False)  # the first adapters still train
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        f"layers.{i}.{name}.{part}.default.weight"
        for i in (0, 1) for name in ("v_proj", "o_proj") for part in ("lora_A", "lora_B")
    }  # fmt: skip
    model(TOKENS).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_hooks_stay_and_can_be_removed():
    model, calls = Model(), []
    layer = model.layers[0].q_proj
    handle = layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_forward_pre_hook(lambda m, a, k: calls.append("pre"), with_kwargs=True)
    model.layers[1].q_proj.register_full_backward_hook(lambda *_: calls.append("backward"))
    replace_linear(model, r=2, progress=False)
    model(TOKENS).sum().backward()
    assert calls == ["pre", "forward", "backward"]
    handle.remove()
    model(TOKENS)
    assert calls == ["pre", "forward", "backward", "pre"]


def test_each_old_weight_is_dropped_before_the_next_is_quantized(monkeypatch):
    model = Model(blocks=3)
    weights = [m.weight for m in model.modules() if type(m) is nn.Linear and m is not model.lm_head]
    references = [weakref.ref(weight) for weight in weights]
    del weights
    alive = []
    replace_one = replace_module._replace_one

    def counted(*args):
        alive.append(sum(reference() is not None for reference in references))
        return replace_one(*args)

    monkeypatch.setattr(replace_module, "_replace_one", counted)
    gc.collect()
    gc.disable()  # reference counts alone must do it
    try:
        replace_linear(model, r=2, progress=False)
    finally:
        gc.enable()
    assert alive == [9, 8, 7, 6, 5, 4, 3, 2, 1]


def test_the_report():
    model = Model().to(torch.bfloat16)
    report = replace_linear(model, ["q_proj", "v_proj"], r=4, blocksize=64, progress=False)
    first = report.replaced[0]
    assert (first.name, first.shape) == ("layers.0.q_proj", (D, D))
    assert first.bytes_before == 2 * (D * D + D)
    # packed, absmax, tables of 16 and 256, one nested absmax, the offset, bias; adapters in float32
    assert first.bytes_after == D * D // 2 + D + 4 * (16 + 256 + 1 + 1) + 2 * D
    assert first.adapter_bytes == 4 * 4 * (D + D)
    assert report.bytes_before == sum(layer.bytes_before for layer in report.replaced)

    text = str(report)
    table, skipped = text.split("\n\n")
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1  # aligned
    assert lines[0].split() == [
        "replaced",
        "shape",
        *["before", "MiB", "after", "MiB", "adapter", "MiB"],
    ]
    assert lines[2].split() == ["layers.0.q_proj", "64", "x", "64", "0.008", "0.003", "0.002"]
    total = [report.bytes_before, report.bytes_after, report.adapter_bytes]
    assert lines[-1].split() == ["total", "4", "layers", *(f"{n / 2**20:.3f}" for n in total)]
    assert skipped.splitlines()[0] == "skipped: 3"
    assert "layers.0.o_proj  not in target_modules" in skipped


def test_progress_bar(capfd):
    replace_linear(Model(), r=2)
    assert "Quantizing: 100%" in capfd.readouterr().err
    replace_linear(Model(), r=2, progress=False)
    assert capfd.readouterr().err == ""


def test_meta_model():
    with torch.device("meta"):
        model = Model()
    report = replace_linear(model, r=2, progress=False)
    assert len(report.replaced) == 6
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"target_modules": ["query"]},
            ValueError,
            "target_modules: 'query' matches no module; .*q_",
        ),
        ({"target_modules": ["q_proj", "qproj"]}, ValueError, "target_modules: 'qproj' matches no"),
        ({"target_modules": "q_proj"}, ValueError, "target_modules: 'q_proj' matches no module"),
        ({"target_modules": "(q"}, ValueError, r"target_modules: expected a regular expression"),
        ({"target_modules": []}, ValueError, "target_modules: expected a linear layer to replace"),
        ({"target_modules": 3}, TypeError, "target_modules: expected a string or strings, got 3"),
        ({"target_modules": ["embed"]}, ValueError, "embed: of type Embedding"),
        ({"target_modules": ["lm_head"]}, ValueError, "lm_head: in exclude_modules"),
        ({"exclude_modules": [1]}, TypeError, r"exclude_modules: expected a string or strings"),
        ({"r": -1}, ValueError, "r: expected an integer >= 0, got -1"),
        ({"lora_dropout": 2}, ValueError, "lora_dropout: expected 0 <= lora_dropout < 1, got 2"),
        ({"adapter_name": "a.b"}, ValueError, "name: expected a non-empty string without '.'"),
        ({"quant_type": "int3"}, ValueError, "quant_type: expected one of .*, got 'int3'"),
        ({"r": 0, "blocksize": 48}, ValueError, "blocksize: expected one of"),
        ({"quant_storage": torch.int32}, ValueError, "quant_storage: expected one of"),
    ],
)
def test_errors_change_nothing(arguments, error, message):
    model = Model()
    before = kinds(model)
    with pytest.raises(error, match=message):
        replace_linear(model, **({"progress": False} | arguments))
    assert kinds(model) == before and all(p.requires_grad for p in model.parameters())


def test_a_weight_of_another_dtype_changes_nothing():
    model = Model()
    model.layers[1].v_proj.double()
    with pytest.raises(TypeError, match=r"layers.1.v_proj.weight: expected float32.*float64"):
        replace_linear(model, progress=False)
    assert set(kinds(model).values()) == {nn.Linear}


def test_a_nan_is_named():
    model = Model()
    model.layers[1].v_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"^layers.1.v_proj: .*got nan at index \(3, 5\)"):
        replace_linear(model, progress=False)
    assert type(model.layers[0].v_proj) is LoRALinear4bit
    assert type(model.layers[1].v_proj) is nn.Linear


@pytest.mark.parametrize("model", [nn.Linear(D, D), Linear4bit(D, D), torch.ones(2)])
def test_a_single_layer_cannot_be_replaced_in_place(model):
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module that contains linear"):
        replace_linear(model)


# -- what has to stay dense ------------------------------------------------------------------------


def reasons(report: ReplaceReport) -> dict[str, str]:
    return {layer.name: layer.reason for layer in report.skipped}


def test_weights_that_are_computed_or_of_another_kind():
    from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

    class Other(torch.Tensor):
        pass

    model = nn.ModuleDict({name: nn.Linear(D, D) for name in "abcdefg"})
    prune.l1_unstructured(model.a, "weight", 0.5)
    weight_norm(model.b)
    spectral_norm(model.c)
    parametrizations.weight_norm(model.d)
    model.e.weight = nn.Parameter(torch.randn(D, D).as_subclass(Other))
    model.f.forward = lambda x: x
    report = replace_linear(model, r=0, progress=False)
    assert names(report) == ["g"]
    assert reasons(report) == {
        **dict.fromkeys("abc", "its weight is computed from other parameters"),
        "d": "of type ParametrizedLinear",
        "e": "its weight is a Other",
        "f": "its forward has been replaced",
    }


def test_layers_of_another_library():
    bnb = pytest.importorskip("bitsandbytes", reason="a peer of the tests")
    model = nn.ModuleDict({"a": bnb.nn.Linear4bit(D, D), "b": bnb.nn.Linear8bitLt(D, D)})
    model["c"] = nn.Linear(D, D)
    report = replace_linear(model, r=0, progress=False)
    assert names(report) == ["c"]
    assert reasons(report) == {
        "a": "of type bitsandbytes's Linear4bit",
        "b": "of type Linear8bitLt",
    }


def test_hooks_of_accelerate():
    hooks = pytest.importorskip("accelerate.hooks", reason="an optional dependency")
    model, x = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D)), torch.randn(2, D)
    hooks.add_hook_to_module(model[0], hooks.AlignDevicesHook("cpu", io_same_device=True))
    weights = {"weight": model[1].weight.detach().clone(), "bias": model[1].bias.detach().clone()}
    offload = hooks.AlignDevicesHook("cpu", offload=True, weights_map=weights)
    hooks.add_hook_to_module(model[1], offload)
    report = replace_linear(model, r=0, progress=False)
    assert names(report) == ["0"] and reasons(report) == {"1": "offloaded by accelerate"}
    assert model[0]._hf_hook.io_same_device and model(x).shape == (2, D)
    hooks.remove_hook_from_module(model[0])
    assert not hasattr(model[0], "_hf_hook") and type(model[0]) is Linear4bit
    hooks.remove_hook_from_module(model[1].to_empty(device="cpu"))
    assert names(replace_linear(model.to("meta"), r=0, progress=False)) == ["1"]


def test_what_a_model_keeps_in_float32():
    class Keeps(Block):
        _keep_in_fp32_modules = ["q_proj"]
        _keep_in_fp32_modules_strict = {"v_proj.weight", "proj"}

    model = nn.ModuleDict({"a": Keeps(), "b": Block()})
    report = replace_linear(model, r=0, progress=False)
    assert names(report) == ["a.o_proj", "b.q_proj", "b.v_proj", "b.o_proj"]
    assert set(reasons(report).values()) == {"kept in float32 by the model"}


def test_stacks_of_experts_are_listed_and_a_warning_says_if_they_are_most():
    model = Model()
    model.experts = nn.ParameterDict({"up": nn.Parameter(torch.randn(8, D, D))})
    report = replace_linear(model, ["q_proj"], r=0, progress=False)
    assert reasons(report)["experts.up"] == (
        "8 matrices of 64 x 64 in one parameter, as experts are: 0.125 MiB stay dense"
    )
    with pytest.warns(UserWarning, match=r"most of this model stays dense: 1 stacks.*experts.up"):
        assert "experts.up" in str(replace_linear(model, r=0, progress=False))


@pytest.mark.parametrize(
    "exclude",
    [["lm_headd"], ["lm_head", "gone"], ["layers.0"], r"model\..*", [""]],
    ids=str,
)
def test_exclusions_that_match_nothing(exclude):
    model = Model()
    with pytest.raises(
        ValueError, match=r"exclude_modules: .* matches no layer; .*layers.0.q_proj"
    ):
        replace_linear(model, exclude_modules=exclude, progress=False)
    assert set(kinds(model).values()) == {nn.Linear}
    del model.lm_head
    assert len(replace_linear(model, r=0, progress=False).replaced) == 6  # the default may


# -- models that PEFT has been at ------------------------------------------------------------------


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="an optional dependency")


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_bases_of_peft_layers_are_replaced_and_adapters_stay(peft):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], init_lora_weights=False
    )
    wrapped = peft.get_peft_model(Model().eval(), config)
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters()}
    trains = trainable(wrapped)
    report = replace_linear(wrapped, r=0, exclude_modules=["o_proj"], progress=False)
    prefix = "base_model.model."
    assert names(report) == [
        f"{prefix}layers.{i}.{name}.base_layer" for i in (0, 1) for name in ("q_proj", "v_proj")
    ]
    why = "base_model.model.lm_head is in modules_to_save, which trains a copy"
    heads = [f"{prefix}lm_head.original_module", f"{prefix}lm_head.modules_to_save.default"]
    assert {name: reasons(report)[name] for name in heads} == dict.fromkeys(heads, why)
    assert not any("lora_" in name for name in reasons(report))
    assert trainable(wrapped) == trains
    for name in trains:
        assert torch.equal(wrapped.get_parameter(name), before[name])

    y = wrapped(TOKENS)
    layer = wrapped.base_model.model.layers[0].q_proj
    packed = layer.base_layer.weight.clone()
    wrapped.merge_adapter()
    assert (wrapped(TOKENS) - y).norm() < 0.2 * y.norm()
    with pytest.raises(ValueError, match="is merged; call unmerge_adapter"):
        replace_linear(wrapped, ["q_proj"], r=0, progress=False)
    wrapped.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, packed) and torch.equal(wrapped(TOKENS), y)


def test_bases_of_other_adapters_are_refused(peft):
    wrapped = peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match=r"q_proj.base_layer: the base of PEFT's Linear, which has"
    ):
        replace_linear(wrapped, ["q_proj"], r=4, progress=False)
    wrapped = peft.get_peft_model(Model(), peft.LoHaConfig(target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match=r"base of PEFT's Linear: only PEFT's LoRA.*before adapters"
    ):
        replace_linear(wrapped, ["q_proj"], r=0, progress=False)
    report = replace_linear(wrapped, r=0, progress=False)
    assert not any("base_layer" in name for name in names(report)) and report.replaced
