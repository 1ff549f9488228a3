"""``adapter_names`` under real PEFT: a batch of mixed adapters in the multi-adapter kernel, values never stale."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lowrank_kernels.interop import peft_layer, peft_mixed
from peft_models import add, assert_near, base, layers, pair, peft, same_adapter, wrapped

NAMES = ["__base__", "default", "b", "c", "b", "default"]
X = (len(NAMES), 7, 64)


def with_three(models) -> None:
    """Adapters of three ranks, one of them in one layer only."""
    add(models, "b", r=20, use_rslora=True)
    add(models, "c", r=3, lora_alpha=5, target_modules=["up"])
    for model in models:
        model.eval()


@pytest.fixture
def model() -> peft.PeftModel:
    model = wrapped()
    with_three([model])
    return model


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What each call of the multi-adapter function had for names."""
    seen = []
    function = peft_mixed.multi_lora_linear_4bit

    def spy(x, w, plan, *rest, **keywords):
        seen.append(plan)
        return function(x, w, plan, *rest, **keywords)

    monkeypatch.setattr(peft_mixed, "multi_lora_linear_4bit", spy)
    return seen


def one_by_one(model: peft.PeftModel, x: torch.Tensor, names: list[str]) -> torch.Tensor:
    rows = []
    for row, name in zip(x, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(row[None]))
        else:
            model.set_adapter(name)
            rows.append(model(row[None]))
    return torch.cat(rows)


@pytest.mark.parametrize("shape", [X, (6, 64), (6, 1, 64), (6, 2, 3, 64)], ids=str)
@torch.no_grad()
def test_each_row_has_its_adapter(model, calls, shape):
    x = torch.randn(shape)
    y = model(x, adapter_names=NAMES)
    assert len(calls) == len(layers(model)) == 2
    assert_near(y, one_by_one(model, x, NAMES))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_sixteen_bits(calls, dtype):
    model = wrapped(base(dtype)).eval()
    with_three([model])
    x = torch.randn(X).to(dtype)
    for layer in layers(model):
        x_layer = torch.randn(*X[:2], layer.in_features, dtype=dtype)
        y = layer(x_layer, adapter_names=NAMES)
        theirs = peft.tuners.lora.Linear._mixed_batch_forward(layer, x_layer, adapter_names=NAMES)
        assert y.dtype == theirs.dtype == dtype and len(calls) > 0
        exact = one_by_one_layer(layer, x_layer.float())
        assert (y - exact).norm() <= (theirs - exact).norm()
    assert model(x, adapter_names=NAMES).dtype == dtype


def one_by_one_layer(layer, x: torch.Tensor) -> torch.Tensor:
    rows = []
    for row, name in zip(x, NAMES, strict=True):
        y = row @ layer.base_layer.dequantize(torch.float32).T
        if layer.base_layer.bias is not None:
            y += layer.base_layer.bias.float()
        if name in layer.lora_A:
            A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
            y += layer.scaling[name] * (row @ A.T @ B.T)
        rows.append(y)
    return torch.stack(rows)


def test_gradients_are_those_of_pefts_loop_on_dense_layers(calls):
    """PEFT refuses adapter_names in training mode; in eval mode a mixed batch trains, here as there."""
    models = pair(r=4)
    with_three(models)
    x, grads = torch.randn(X), []
    for model in models:
        model.base_model.set_adapter(["default", "b", "c"])
        inputs = x.clone().requires_grad_()
        y = model(inputs, adapter_names=NAMES)
        (y * torch.linspace(-1, 1, 10)).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        grads[-1]["x"] = inputs.grad
    assert calls and len(grads[0]) == 11 and grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        assert_near(grads[0][name], grads[1][name])
    with pytest.raises(ValueError, match="training mode"):
        models[0].train()(x, adapter_names=NAMES)


@torch.no_grad()
def test_one_plan_for_all_layers_and_steps(calls):
    model, x = wrapped().eval(), torch.randn(X)
    add([model], "b", r=20)
    names = ["__base__", "default", "b", "b", "b", "default"]
    for _ in range(3):
        model(x, adapter_names=names)
    assert len(calls) == 6 and len(set(map(id, calls))) == 1
    model(x[:, :2], adapter_names=names)
    model(x, adapter_names=names[::-1])
    assert len(set(map(id, calls))) == 3


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "write", ["data", "trained", "in place", "assign", "parameter", "scale", "hotswap", "weighted"]
)
def test_values_are_never_stale(model, tmp_path, write, grad):
    """No version counter sees what is written through ``.data``, as some optimizers do."""
    x = torch.randn(X)
    for layer in layers(model):
        layer.lora_B["b"].weight.requires_grad_(write == "trained")
    with torch.set_grad_enabled(grad):
        before = model(x, adapter_names=NAMES)
        for layer in layers(model):
            weight = layer.lora_B["b"].weight
            if write in ("data", "trained"):
                weight.data.mul_(-2)
            elif write == "parameter":
                layer.lora_B["b"].weight = nn.Parameter(-2 * weight.detach(), requires_grad=False)
            elif write == "in place":
                with torch.no_grad():
                    weight.mul_(-2)
            elif write == "assign":
                weight.data = torch.randn_like(weight)
            elif write == "scale":
                layer.set_scale("b", -2)
        if write == "hotswap":
            from peft.utils.hotswap import hotswap_adapter

            other = wrapped(r=20, use_rslora=True)
            other.save_pretrained(tmp_path)
            model.set_adapter("b")
            hotswap_adapter(model, tmp_path, adapter_name="b")
        if write == "weighted":
            model.delete_adapter("b")
            model.add_weighted_adapter(["default"], [3.0], "b", combination_type="linear")
        after = model(x, adapter_names=NAMES)
        assert_near(after, one_by_one(model, x, NAMES))
    assert not torch.allclose(after[2], before[2])
    assert write == "hotswap" or torch.equal(after[1], before[1])  # which empties other adapters


@pytest.mark.parametrize("by", ["set_adapter", "train", "requires_grad"])
def test_training_in_between_that_leaves_no_trace(model, by):
    """As by an optimizer that writes by pointer; the adapter is frozen at both mixed batches."""
    x = torch.randn(X)
    model.set_adapter("default")
    weights = [layer.lora_B["b"].weight for layer in layers(model)]
    if by == "requires_grad":
        for weight in weights:
            weight.requires_grad_(True)
    with torch.no_grad():
        model(x, adapter_names=NAMES)
        if by == "set_adapter":
            model.set_adapter("b")
        for weight in weights:
            weight.data.mul_(-2)
        if by == "set_adapter":
            model.set_adapter("default")
        elif by == "train":
            model.train().eval()
        for weight in weights:
            weight.requires_grad_(False)
        y = model(x, adapter_names=NAMES)
        assert_near(y, one_by_one(model, x, NAMES))


@torch.no_grad()
def test_adapters_live_in_their_pages(model):
    """After one batch nothing is copied: parameters are the pages, whatever changes their values."""
    x = torch.randn(X)
    before = {n: p.clone() for n, p in model.named_parameters() if "lora_" in n}
    model(x, adapter_names=NAMES)
    homes = {}
    for layer in layers(model):
        pages = layer._mixed_adapters[torch.float32].pages
        storages = {pages.A.untyped_storage().data_ptr(), pages.B.untyped_storage().data_ptr()}
        for name in layer.lora_A:
            for part in (layer.lora_A, layer.lora_B):
                weight = part[name].weight
                assert weight.untyped_storage().data_ptr() in storages
                homes[weight] = weight.data_ptr()
    model(x, adapter_names=NAMES[::-1])
    assert all(weight.data_ptr() == address for weight, address in homes.items())
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value), name
    for layer in layers(model):
        layer.forget_pages()
        assert all(p.is_contiguous() for p in layer.parameters())
    assert all(weight.data_ptr() != address for weight, address in homes.items())
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value), name


def test_saving_copying_pickling_adapters_that_live_in_pages(model, tmp_path):
    """Plain tensors everywhere: safetensors refuses transposed ones, pickles would hold all the pages."""
    x = torch.randn(X)
    expected = model(x, adapter_names=NAMES)
    for entries in (model.state_dict(), peft.get_peft_model_state_dict(model, adapter_name="b")):
        for key, tensor in entries.items():
            if "lora_" in key:
                assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    model.save_pretrained(tmp_path)
    loaded = wrapped()
    loaded.base_model.model.load_state_dict(
        {n: t for n, t in model.base_model.model.state_dict().items() if "lora_" not in n},
        strict=False,
    )
    for name, folder in (("default", tmp_path), ("b", tmp_path / "b"), ("c", tmp_path / "c")):
        if name == "default":
            loaded.delete_adapter("default")
        loaded.load_adapter(folder, name)
    assert torch.equal(loaded.eval()(x, adapter_names=NAMES), expected)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for p in copied.parameters():
            assert p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes
        assert torch.equal(copied(x, adapter_names=NAMES), expected)
    file = io.BytesIO()
    torch.save(layers(model)[0].lora_B["b"].weight, file)
    assert len(file.getvalue()) < 20_000
    model.load_state_dict(
        {n: t * 2 for n, t in model.state_dict().items() if "lora_B" in n}, strict=False
    )
    assert_near(model(x, adapter_names=NAMES), one_by_one(model, x, NAMES))


def test_adapters_of_several_dtypes_in_a_batch(model, calls):
    for layer in layers(model):
        layer.lora_A["b"].bfloat16().requires_grad_(True)
        layer.lora_B["b"].bfloat16().requires_grad_(True)
    x = torch.randn(X)
    expected = one_by_one(model, x, NAMES)
    model.base_model.set_adapter(["default", "b", "c"])
    y = model(x, adapter_names=NAMES)
    assert_near(y, expected)
    assert len(calls) == 2
    y.square().sum().backward()
    mixed = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    one = torch.zeros(())
    for row, name in zip(x, NAMES, strict=True):
        one = one + model(row[None], adapter_names=[name]).square().sum()
    one.backward()
    assert {n for n in mixed if ".b." in n} and all("lora" in n for n in mixed)
    for name, gradient in mixed.items():
        expected = model.get_parameter(name).grad
        assert (gradient - expected).norm() <= 0.01 * expected.norm(), name  # sums in bfloat16


def test_dropout_of_a_layer_in_training_mode():
    """Each adapter's own, from the first call on; a row without adapter has none."""
    model = wrapped(lora_dropout=0.5)
    add([model], "b", r=4)
    layer, x = layers(model)[0], torch.randn(3, 4000, 64)
    names = ["default", "b", "__base__"]
    expected = layer.eval()(x, adapter_names=names)
    layer.train()
    seen = []
    for _ in range(2):
        torch.manual_seed(0)
        seen.append(layer(x, adapter_names=names))
    assert torch.equal(*seen) and torch.equal(seen[0][1:], expected[1:])
    difference = (seen[0][0] - expected[0]).abs()
    assert difference.mean() > 0.05 and (seen[0][0] - expected[0]).mean(0).abs().max() < 0.05


def test_a_later_forward_does_not_disturb_a_backward(model):
    x, grads = torch.randn(X), []
    for disturb in (False, True):
        inputs = x.clone().requires_grad_()
        y = model(inputs, adapter_names=NAMES)
        if disturb:
            for layer in layers(model):
                layer.set_scale("b", 5)
            model(x, adapter_names=NAMES)
        y.sum().backward()
        grads.append(inputs.grad)
    assert torch.equal(*grads)


@torch.no_grad()
def test_adapters_come_and_go(model):
    x = torch.randn(X)
    model(x, adapter_names=NAMES)
    model.delete_adapter("b")
    assert all(not layer._mixed_adapters for layer in layers(model)), "no pages for what is gone"
    add([model], "b", r=5)
    add([model], "d", r=40)
    names = ["d", *NAMES[1:]]
    assert_near(model(x, adapter_names=names), one_by_one(model, x, names))
    for layer in layers(model):  # another dtype and a rank, as hotswapping pads it
        layer.lora_A["d"] = nn.Linear(layer.in_features, 48, bias=False, dtype=torch.bfloat16)
        layer.lora_B["d"] = nn.Linear(48, layer.out_features, bias=False, dtype=torch.bfloat16)
    assert_near(model(x, adapter_names=names), one_by_one(model, x, names))


def test_what_the_kernel_does_not_do_goes_pefts_way(model, calls):
    """A trained bias, and variants, in the batch; without them the same layer uses the kernel."""
    x = torch.randn(X)
    add([model], "bias", r=4, lora_bias=True)
    for layer in layers(model):
        nn.init.normal_(layer.lora_B["bias"].weight)
        nn.init.normal_(layer.lora_B["bias"].bias)
    add([model], "dora", r=4, use_dora=True)
    names = ["bias", *NAMES[1:]]
    with torch.no_grad():
        assert_near(model(x, adapter_names=names), one_by_one(model, x, names))
        assert not calls
        model(x, adapter_names=NAMES)
        assert len(calls) == 2
    y = model(x.requires_grad_(), adapter_names=names)
    y.sum().backward()
    assert x.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="DoRA"):
        model(x, adapter_names=["dora", *NAMES[1:]])


def test_pefts_own_checks(model):
    x = torch.randn(X)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        layers(model)[0](x, adapter_names=NAMES[1:])
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(x, adapter_names=["nobody", *NAMES[1:]])
    with model.disable_adapter(), torch.no_grad():
        y = model(x, adapter_names=NAMES)
        assert torch.equal(y, model(x))
    with torch.no_grad():
        assert torch.equal(model(x, adapter_names=["__base__"] * 6), y)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        model(x, adapter_names=NAMES)


def test_after_inference_mode(model):
    """Pages and plans that were made in inference mode serve and train outside of it."""
    x = torch.randn(X)
    peft_mixed._plan.cache_clear()
    with torch.inference_mode():
        y = model(x, adapter_names=NAMES)
    assert torch.equal(model(x.requires_grad_(), adapter_names=NAMES), y)
    model(x, adapter_names=NAMES).sum().backward()
    assert x.grad.abs().sum() > 0


def test_layers_are_freed(model):
    """The cache of plans holds no layer."""
    import gc
    import weakref

    with torch.no_grad():
        model(torch.randn(X), adapter_names=NAMES)
    gone = weakref.ref(layers(model)[0]._mixed_adapters[torch.float32])
    for layer in layers(model):
        layer._mixed_adapters = {}
    gc.collect()
    assert gone() is None and isinstance(layers(model)[0], peft_layer.PeftLinear4bit)


def test_same_adapter_of_two_models(calls):
    """Two models with adapters of the same names and ranks share plans, not values."""
    models = [wrapped().eval(), wrapped().eval()]
    for model in models:
        with_three([model])
    x = torch.randn(X)
    with torch.no_grad():
        for model in models:
            assert_near(model(x, adapter_names=NAMES), one_by_one(model, x, NAMES))
    assert calls[0] is calls[2] and calls[1] is calls[3]
    same_adapter(models[0], models[1], "b")
    assert_near(models[1](x, adapter_names=NAMES), one_by_one(models[1], x, NAMES))
