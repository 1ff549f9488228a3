"""Every method of PEFT on Linear4bit: it works and merges as on the dense weight, or is refused; bytes never change."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.packed import plain

peft = pytest.importorskip("peft", reason="these are its methods")

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS  # noqa: E402

from lowrank_kernels.interop.peft_methods import WORKING  # noqa: E402

METHODS = {kind.value: config for kind, config in CONFIGS.items()}
# What is not made from linear layers of the model, or only wraps the whole model.
ELSEWHERE = {
    "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT", "XLORA",
    "CARTRIDGE",
}  # fmt: skip
REFUSED = sorted(set(METHODS) - WORKING - ELSEWHERE)
SETTINGS = {
    "ADALORA": {"total_step": 10, "init_lora_weights": False},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": ["down"], "init_ia3_weights": False},
    "OFT": {"oft_block_size": 8},
    "ROAD": {"group_size": 32},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "r": 2},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 20},
}
WITHOUT_MERGING = {"LILY", "POLY"}
MERGING = sorted(WORKING & set(METHODS) - WITHOUT_MERGING)
BF16 = torch.bfloat16


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 32)

    def forward(self, x, **kwargs):
        return self.down(torch.relu(self.norm(self.up(x))))


def config_of(method: str, **changes):
    settings = {"target_modules": ["up", "down"]} | SETTINGS.get(method, {}) | changes
    names = inspect.signature(METHODS[method]).parameters
    return METHODS[method](**{name: v for name, v in settings.items() if name in names})


def bytes_of(model: nn.Module) -> list[torch.Tensor]:
    return [plain(model.get_submodule(n).weight).clone().view(torch.uint8) for n in ("up", "down")]


def pair(storage=torch.uint8) -> tuple[nn.Module, nn.Module]:
    """A model in 4 bits and the same with dense weights."""
    model = Net()
    lk.replace_linear(model, r=0, progress=False, quant_storage=storage)
    dense = copy.deepcopy(model)
    for name in ("up", "down"):
        layer = model.get_submodule(name)
        new = nn.Linear(layer.in_features, layer.out_features)
        new.weight.data = layer.dequantize(torch.float32)
        new.bias.data.copy_(layer.bias)
        setattr(dense, name, new)
    return model, dense


def with_method(method: str, models, **changes) -> list[nn.Module]:
    """The method on each model, with the same values that do something."""
    made = []
    for model in models:
        torch.manual_seed(7)
        made.append(peft.get_peft_model(model, config_of(method, **changes)).eval())
    spread(*made)
    return made


@torch.no_grad()
def spread(first: nn.Module, *others: nn.Module) -> None:
    for name, parameter in first.named_parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))
            for other in others:
                other.get_parameter(name).data.copy_(parameter)


def base_of(layer: nn.Module) -> nn.Module:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def call(model: nn.Module, method: str, x: torch.Tensor) -> torch.Tensor:
    if method == "POLY":
        tasks = torch.zeros(len(x), dtype=torch.long)
        return model.base_model(x[:, None], task_ids=tasks)[:, 0]
    return model(x)


@pytest.mark.parametrize("storage", [torch.uint8, BF16])
@pytest.mark.parametrize("method", sorted(WORKING & set(METHODS)))
def test_forward_and_gradients(method, storage):
    model, dense = pair(storage)
    before, x = bytes_of(model), torch.randn(5, 64)
    ours, theirs = with_method(method, (model, dense))
    y, wanted = call(ours, method, x), call(theirs, method, x)
    assert torch.allclose(y, wanted, rtol=1e-4, atol=1e-5)
    y.sum().backward()
    wanted.sum().backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert gradients
    for name, gradient in gradients.items():
        assert torch.allclose(ours.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-4), name
    bases = [base_of(layer) for layer in (model.up, model.down)]
    for base, packed in zip(bases, before):
        assert torch.equal(plain(base.weight).view(torch.uint8), packed)


@pytest.mark.filterwarnings("ignore:.*nmerge result can be inaccurate")
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("method", MERGING)
def test_merging(method, safe):
    """The merged bytes are those of the weight that PEFT's own merging gives, and unmerging restores the original."""
    model, dense = pair()
    x, bias = torch.randn(5, 64), model.up.bias.clone()
    before = bytes_of(model)
    ours, theirs = with_method(method, (model, dense))
    y = ours(x)
    for made in (ours, theirs):
        made.merge_adapter(safe_merge=safe)
    for name in ("up", "down"):
        layer, other = (base_of(m.base_model.model.get_submodule(name)) for m in (ours, theirs))
        if layer.merged:  # methods that change only the bias leave the bytes alone
            wanted = lk.quantize_4bit(other.weight.detach()).packed
            assert torch.equal(plain(layer.weight), wanted.view_as(layer.weight))
        else:
            assert torch.equal(layer.dequantize(torch.float32), other.weight)
        assert torch.allclose(layer.bias, other.bias, atol=1e-6)
    assert (ours(x) - theirs(x)).norm() < 0.3 * theirs(x).norm()
    ours.unmerge_adapter()
    restored = [base_of(layer) for layer in (ours.base_model.model.up, ours.base_model.model.down)]
    for base, packed in zip(restored, before):
        assert torch.equal(plain(base.weight).view(torch.uint8), packed) and not base.merged
    assert torch.equal(restored[0].bias, bias)
    assert torch.allclose(ours(x), y, atol=1e-6)
    ours.merge_adapter()
    merged = ours(x)
    unloaded = ours.unload()
    assert type(unloaded.up) is lk.Linear4bit and not unloaded.up.merged
    assert torch.allclose(unloaded(x), merged, atol=1e-6)


@pytest.mark.parametrize("method", ["IA3", "OFT", "VERA", "FOURIERFT", "C3A"])
def test_two_adapters_merge_into_the_original(method):
    """One after another is the same as both at once: nothing is quantized twice."""
    model, _ = pair()
    made = with_method(method, [model])[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about a second adapter
        made.add_adapter("second", config_of(method))
    made.set_adapter("second")
    spread(made)
    both = copy.deepcopy(made)
    made.merge_adapter(["default"])
    made.merge_adapter(["second"])
    both.merge_adapter(["default", "second"])
    layers = [base_of(m.base_model.model.up) for m in (made, both)]
    assert torch.equal(plain(layers[0].weight), plain(layers[1].weight))
    assert made.base_model.model.up.merged_adapters == ["default", "second"]


def test_merging_what_is_not_finite_changes_nothing():
    model, _ = pair()
    before = bytes_of(model)
    made = with_method("VERA", [model])[0]
    with torch.no_grad():
        made.base_model.model.up.vera_lambda_b["default"].fill_(float("nan"))
    with pytest.raises(ValueError, match=r"finite|NaN"):
        made.merge_adapter()
    up = made.base_model.model.up
    assert torch.equal(plain(up.base_layer.weight).view(torch.uint8), before[0]) and not up.merged


@pytest.mark.parametrize("method", REFUSED)
def test_what_needs_a_dense_weight_is_refused(method):
    model, _ = pair()
    before = bytes_of(model)
    with pytest.raises((ValueError, ImportError), match=r"peft_type: expected one of|scikit-learn"):
        peft.get_peft_model(model, config_of(method))
    assert type(model.up) is lk.Linear4bit
    assert all(torch.equal(a, b) for a, b in zip(bytes_of(model), before))


def test_a_refused_method_works_on_dense_layers_beside():
    model = Net()
    lk.replace_linear(model, ["up"], r=0, progress=False)
    x = torch.randn(5, 64)
    made = with_method("LOHA", [model], target_modules=["down"])[0]
    y = made(x)
    made.merge_adapter()
    assert torch.allclose(made(x), y, atol=1e-5)
    norms = peft.get_peft_model(pair()[0], peft.LNTuningConfig(target_modules=["norm"]))
    norms(x).sum().backward()


def test_dense_layers_of_an_adopted_class_merge_as_ever():
    _, dense = pair()
    made = with_method("IA3", [dense])[0]
    with_method("IA3", [pair()[0]])  # the class has been changed for 4-bit layers
    x = torch.randn(5, 64)
    y = made(x)
    made.merge_adapter()
    assert torch.allclose(made(x), y, atol=1e-5)
    merged = made.base_model.model.up.base_layer.weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.unmerge_adapter()
    assert not torch.equal(made.base_model.model.up.base_layer.weight, merged)


def test_copies_and_pickles_of_merged_layers():
    made = with_method("OFT", [pair()[0]])[0]
    x = torch.randn(5, 64)
    y = made(x)
    made.merge_adapter()
    twin = copy.deepcopy(made)
    assert torch.equal(twin(x), made(x))
    twin.unmerge_adapter()
    assert torch.allclose(twin(x), y, atol=1e-6)


# -- compute_dtype ---------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [torch.uint8, BF16, torch.float32])
@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
def test_adapters_have_the_dtype_that_they_have_on_a_dense_base(storage, autocast_adapter_dtype):
    """PEFT gives adapters the dtype of the base layer, which it reads of 4-bit layers as compute_dtype."""
    model = Net().to(BF16)
    dense = copy.deepcopy(model)
    lk.replace_linear(model, r=0, progress=False, quant_storage=storage)
    assert model.up.compute_dtype == BF16
    config = peft.LoraConfig(target_modules=["up"], r=4)
    made = [
        peft.get_peft_model(m, config, autocast_adapter_dtype=autocast_adapter_dtype)
        for m in (model, dense)
    ]
    ours, theirs = ({n: p.dtype for n, p in m.named_parameters() if "lora" in n} for m in made)
    assert ours == theirs
    assert set(ours.values()) == {torch.float32 if autocast_adapter_dtype else BF16}


# -- variants of LoRA that read the base weight, or its dtype ------------------------------------------


def variant(name: str) -> dict:
    if name == "mica":
        return {"init_lora_weights": "mica"}
    if name == "bdlora":
        kind = getattr(peft, "BdLoraConfig", None) or pytest.skip("this version has no BD-LoRA")
        return {
            "use_bdlora": kind(target_modules_bd_a=["up"], target_modules_bd_b=["down"], nblocks=2)
        }
    kind = getattr(peft, "VeloraConfig", None) or pytest.skip("this version has no VeLoRA")
    return {"velora_config": kind(num_groups=4, init_type=name.removeprefix("velora_"))}


@pytest.mark.parametrize("storage", [torch.uint8, BF16])
@pytest.mark.parametrize("name", ["mica", "bdlora", "velora_random", "velora_batch_average_once"])
def test_variants_that_only_read_the_base(name, storage):
    model, dense = pair(storage)
    before, x = bytes_of(model), torch.randn(5, 64)
    made = []
    for net in (model, dense):
        torch.manual_seed(7)
        config = peft.LoraConfig(target_modules=["up", "down"], r=4, **variant(name))
        made.append(peft.get_peft_model(net, config))
    ours, theirs = made
    for (key, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters()):
        assert key == other
        if "lora" in key:  # drawn, or MiCA's singular vectors, as on the dense base
            assert torch.equal(a, b) and a.dtype == b.dtype and a.requires_grad == b.requires_grad
    spread(ours, theirs)
    for net in made:
        torch.manual_seed(8)
        net.train()(x).sum().backward()
    for key, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(ours.get_parameter(key).grad, parameter.grad, atol=1e-3), key
    y = ours.eval()(x)
    assert torch.allclose(y, theirs.eval()(x), atol=1e-4)
    for net in made:
        net.merge_adapter()
    for part in ("up", "down"):
        layer, other = (base_of(net.base_model.model.get_submodule(part)) for net in made)
        wanted = lk.quantize_4bit(other.weight.detach(), quant_storage=storage)
        error = (layer.dequantize() - wanted.dequantize()).norm() / wanted.dequantize().norm()
        assert error < 1e-3  # codes between two values may go to either
    ours.unmerge_adapter()
    for part, packed in zip(("up", "down"), before):
        layer = base_of(ours.base_model.model.get_submodule(part))
        assert torch.equal(plain(layer.weight).view(torch.uint8), packed)


def test_mica_takes_the_singular_vectors_of_the_weight():
    model, _ = pair()
    dense = model.up.dequantize(torch.float32)
    made = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["up"], r=4, init_lora_weights="mica")
    )
    layer = made.base_model.model.up
    U = torch.linalg.svd(dense)[0][:, -4:]
    assert torch.allclose(layer.lora_B["default"].weight, U, atol=1e-6)
    assert not layer.lora_B["default"].weight.requires_grad


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"kasa_config": "KasaConfig"},
            "kasa_config: .*replaces the base weight by one of lower rank",
        ),
        ({"use_qalora": True}, "use_qalora: .*for GPTQ's layers alone and would be ignored here"),
    ],
)
def test_the_reasons_are_the_true_ones(changes, reason):
    ((name, value),) = changes.items()
    if isinstance(value, str):
        value = (getattr(peft, value, None) or pytest.skip("this version has no KaSA"))()
    model, dense = pair()
    before = bytes_of(model)
    config = {"target_modules": ["up"], "r": 4, name: value}
    with pytest.raises(ValueError, match=reason):
        peft.get_peft_model(model, peft.LoraConfig(**config))
    assert all(torch.equal(a, b) for a, b in zip(bytes_of(model), before))
    weight = dense.up.weight.clone()
    made = peft.get_peft_model(dense, peft.LoraConfig(**config)).base_model.model.up
    if name == "kasa_config":
        assert not torch.allclose(made.base_layer.weight, weight, atol=1e-4)
        assert torch.linalg.matrix_rank(made.base_layer.weight, rtol=1e-5) == 60
    else:
        assert made.lora_variant == {} and made.lora_A["default"].in_features == 64
