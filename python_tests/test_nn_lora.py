"""LoRALinear4bit as a module: numbers, adapters, merging, compile, checkpointing, autocast."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowrank_kernels import reference
from lowrank_kernels.functional import linear_4bit
from lowrank_kernels.nn import Linear4bit, LoRALinear4bit
from test_nn import BF16, F16, F32, K, N, R, linear, lora, same_weight
from tolerance import assert_same_bits, check


@pytest.mark.parametrize("adapter_dtype", [None, BF16])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_lora_forward_and_gradients(dtype, adapter_dtype):
    layer = LoRALinear4bit.from_linear(
        linear(dtype=BF16), r=R, init_lora_weights=False, adapter_dtype=adapter_dtype
    )
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert {A.dtype, B.dtype} == {adapter_dtype or F32} and layer.scaling == {"default": 32 / R}
    x = torch.randn(2, 3, K).to(dtype).requires_grad_()
    y = layer(x)
    rows = x.detach().flatten(0, 1)
    weight, bias = layer.weight4bit.op_args(), layer.bias.detach()
    rest = (A.detach(), B.detach(), 32 / R, bias, 0.0, None)
    s = reference.lora_linear_4bit(rows, *weight, *rest)[1].float()
    check("lora_linear_4bit", (rows, *weight, *rest), (y.flatten(0, 1), s))

    dy = torch.randn_like(y)
    y.backward(dy)
    grads = (x.grad.flatten(0, 1), A.grad, B.grad, layer.bias.grad)
    args = (dy.flatten(0, 1), rows, s, *weight, *rest, True, True, True, True)
    # S above is rounded from float64; the kernel's own S differs by the bound of its sum.
    check("lora_linear_4bit_backward", args, grads, c=16.0)
    assert [g.dtype for g in grads] == [dtype, A.dtype, B.dtype, BF16]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_initialisation(use_rslora):
    torch.manual_seed(0)
    layer = LoRALinear4bit(256, 32, r=16, lora_alpha=8, use_rslora=use_rslora)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert not B.any() and A.shape == (16, 256) and B.shape == (32, 16)
    assert A.abs().max() <= 1 / 16  # Kaiming-uniform with a = sqrt 5: U(-1/sqrt K, 1/sqrt K)
    assert A.std().item() == pytest.approx(1 / 16 / math.sqrt(3), rel=0.05)
    assert layer.scaling["default"] == 8 / (4 if use_rslora else 16)
    layer.add_adapter("g", r=8, init_lora_weights="gaussian")
    assert layer.lora_A["g"].weight.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert not layer.lora_B["g"].weight.any()
    x = torch.randn(3, 256)
    assert torch.equal(layer(x), linear_4bit(x, layer.weight4bit, layer.bias))


def trainable(layer):
    return {name for name, p in layer.named_parameters() if p.requires_grad and "lora" in name}


def test_one_adapter_is_active():
    layer = lora()
    x = torch.randn(2, K)
    first, base = layer(x), linear_4bit(x, layer.weight4bit, layer.bias)
    layer.add_adapter("b", r=2, init_lora_weights=False)
    assert layer.active_adapter == "default" and torch.equal(layer(x), first)
    assert trainable(layer) == {"lora_A.default.weight", "lora_B.default.weight"}
    layer.set_adapter("b")
    assert trainable(layer) == {"lora_A.b.weight", "lora_B.b.weight"}
    delta = layer.scaling["b"] * x @ layer.lora_A["b"].weight.T @ layer.lora_B["b"].weight.T
    assert torch.allclose(layer(x), base + delta, atol=1e-5) and not torch.equal(layer(x), first)

    layer.set_adapter("elsewhere")  # an adapter of other layers
    assert torch.equal(layer(x), base) and not trainable(layer)
    layer.set_adapter("b")
    layer.delete_adapter("b")
    assert layer.active_adapter is None and torch.equal(layer(x), base)
    assert "lora_A.b.weight" not in layer.state_dict() and layer.r == {"default": R}
    layer.set_adapter("default")
    assert torch.equal(layer(x), first)


def test_disable_adapters_as_call_and_context():
    layer = lora()
    x = torch.randn(2, K)
    with_adapter, base = layer(x), linear_4bit(x, layer.weight4bit, layer.bias)
    with layer.disable_adapters():
        assert torch.equal(layer(x), base)
        with layer.disable_adapters():
            pass
        assert torch.equal(layer(x), base)
    assert torch.equal(layer(x), with_adapter)
    with pytest.raises(KeyError), layer.disable_adapters():
        raise KeyError
    assert torch.equal(layer(x), with_adapter)
    layer.disable_adapters()
    assert torch.equal(layer(x), base)
    layer.enable_adapters()
    assert torch.equal(layer(x), with_adapter)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"r": 0}, ValueError, "r: expected an integer >= 1, got 0"),
        ({"r": 2.0}, ValueError, "r: expected an integer >= 1, got 2.0"),
        ({"lora_alpha": math.nan}, ValueError, "lora_alpha: expected a finite number, got nan"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout: expected 0 <= lora_dropout < 1, got 1"),
        ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights: expected .* got 'pissa'"),
        ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype: expected .* got torch.int8"),
        ({"name": "a.b"}, ValueError, r"name: expected a non-empty string without '.' .*got 'a.b'"),
        (
            {"name": "keys"},
            ValueError,
            "name: expected .* no attribute of nn.ModuleDict, got 'keys'",
        ),
        ({"name": "default"}, ValueError, r"name: expected a new adapter, got 'default'"),
    ],
)
def test_add_adapter_errors(arguments, error, message):
    layer = lora()
    with pytest.raises(error, match=message):
        layer.add_adapter(**({"name": "new"} | arguments))
    assert layer.r == {"default": R} and len(layer.state_dict()) == 9
    with pytest.raises(ValueError, match=r"name: expected one of \['default'\], got 'new'"):
        layer.delete_adapter("new")


@pytest.mark.parametrize(
    "settings",
    [{}, {"quant_type": "fp4", "double_quant": False, "quant_storage": BF16, "dtype": BF16}],
    ids=str,
)
def test_merge_and_unmerge(settings):
    layer = lora(**settings)
    layer.weight4bit.packed.data = layer.weight.data.view(1, -1)
    original, x = copy.deepcopy(layer.weight4bit), torch.randn(3, K)
    unmerged = layer(x)
    adapter = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    dense = (layer.dequantize(F32) + layer.scaling["default"] * adapter).detach()
    layer.merge()
    assert layer.merged and layer.weight.shape == original.packed.shape
    assert (layer.quant_type, layer.blocksize, layer.double_quant, layer.weight.dtype) == (
        original.quant_type, original.blocksize, original.double_quant, original.packed.dtype,
    )  # fmt: skip
    assert layer.dequantize().dtype == settings.get("dtype", F32)
    # Each element moves by at most half a step of its block: the widest gap of codes times absmax.
    gap = 0.36 if original.quant_type == "nf4" else 0.34
    assert (layer.dequantize(F32) - dense).abs().max() <= gap / 2 * dense.abs().max() * 1.05
    assert not torch.equal(layer.dequantize(), original.dequantize())
    assert torch.equal(layer(x), linear_4bit(x, layer.weight4bit, layer.bias))
    with layer.disable_adapters():
        assert torch.equal(layer(x), linear_4bit(x, original, layer.bias))
        with pytest.raises(RuntimeError, match="merge: adapter 'default' is merged"):
            layer.merge()
    layer.unmerge()
    same_weight(layer, original)
    assert torch.equal(layer(x), unmerged) and not layer.merged


def test_merged_states_that_are_errors():
    layer = lora()
    with pytest.raises(RuntimeError, match="unmerge: nothing is merged; call merge"):
        layer.unmerge()
    with (
        layer.disable_adapters(),
        pytest.raises(RuntimeError, match="merge: adapters are disabled"),
    ):
        layer.merge()
    state = layer.state_dict()
    layer.merge()
    for action in (lambda: layer.set_adapter("b"), lambda: layer.delete_adapter("default")):
        with pytest.raises(RuntimeError, match="adapter 'default' is merged; call unmerge"):
            action()
    with pytest.raises(RuntimeError, match=r"weight: the layer is merged; call unmerge\(\)"):
        layer.load_state_dict(state)
    layer.add_adapter("b", r=2)  # allowed: it is not active
    assert layer.active_adapter == "default" and trainable(layer).isdisjoint({"lora_A.b.weight"})
    layer.unmerge()
    layer.delete_adapter("b")
    layer.delete_adapter("default")
    with pytest.raises(RuntimeError, match="merge: no adapter is active"):
        layer.merge()
    layer.set_adapter("elsewhere")
    before = layer.weight4bit
    layer.merge()  # nothing to add here
    assert layer.merged and layer.weight4bit is before
    layer.unmerge()


def test_lora_state_dict_round_trip():
    layer = lora()
    layer.add_adapter("b", r=2, init_lora_weights=False)
    state = layer.state_dict()
    assert {k: tuple(v.shape) for k, v in state.items() if "lora" in k} == {
        "lora_A.default.weight": (R, K), "lora_B.default.weight": (N, R),
        "lora_A.b.weight": (2, K), "lora_B.b.weight": (N, 2),
    }  # fmt: skip
    other = lora()
    with pytest.raises(RuntimeError, match=r"lora_A\.b\.weight"):
        other.load_state_dict(state)
    other.add_adapter("b", r=2)
    other.load_state_dict(state)
    for key, tensor in state.items():
        assert_same_bits(key, other.state_dict()[key], tensor)
    base = {k: v for k, v in state.items() if "lora" not in k}
    with pytest.raises(RuntimeError, match=r"lora_A\.default\.weight"):
        other.load_state_dict(base)
    Linear4bit(K, N).load_state_dict(base)


def test_dropout_in_training_only():
    layer = lora(lora_dropout=0.5)
    x = torch.randn(64, K)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    layer.eval()
    without = layer(x)
    assert torch.equal(layer(x), without) and not torch.equal(without, first)
    with layer.disable_adapters():
        base = layer(x)
    layer.train()
    mean = torch.stack([layer(x) for _ in range(200)]).mean(0)
    # The mean over masks is the value without dropout; 200 draws leave about 1/14 of the spread.
    spread = (first - base).std()
    assert (mean - without).abs().mean() < 0.2 * spread and (mean - base).std() > 0.4 * spread


# -- under PyTorch's machinery ---------------------------------------------------------------------


class Chain(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        layers = [
            LoRALinear4bit.from_linear(nn.Linear(K, K), r=R, lora_dropout=dropout) for _ in range(3)
        ]
        self.layers = nn.ModuleList(layers)
        for layer in layers:
            nn.init.normal_(layer.lora_B["default"].weight, std=0.05)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def gradients(model, run, x):
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = run(leaf)
    y.backward(torch.ones_like(y))
    return [y, leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def test_compile_without_a_graph_break():
    torch.compiler.reset()
    model, x = Chain(), torch.randn(5, K)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = gradients(model, model, x)
    for actual, value in zip(gradients(model, compiled, x), expected, strict=True):
        assert torch.allclose(actual, value, rtol=1e-5, atol=1e-6)
    assert len(expected) == 2 + 3 * 3
    with torch.compiler.set_stance("fail_on_recompile"):
        gradients(model, compiled, x)
    model.eval()
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), rtol=1e-5, atol=1e-6)


def test_export():
    layer, x = lora().eval(), torch.randn(5, K)
    exported = torch.export.export(layer, (x,)).module()
    assert torch.equal(exported(x), layer(x))


def test_compiled_layers_share_one_graph():
    torch.compiler.reset()
    model, x = Chain(), torch.randn(5, K)
    compiled = [torch.compile(m, fullgraph=True, backend="aot_eager") for m in model.layers]
    compiled[0](x)
    with torch.compiler.set_stance("fail_on_recompile"):
        for layer, run in zip(model.layers, compiled, strict=True):
            assert torch.equal(run(x), layer(x))


def test_compiled_dropout_uses_one_mask_forward_and_backward():
    torch.compiler.reset()
    eye = nn.Linear(K, K, bias=False)
    nn.init.zeros_(eye.weight)
    layer = LoRALinear4bit.from_linear(eye, r=K, lora_alpha=K, lora_dropout=0.5)
    for part in (layer.lora_A, layer.lora_B):
        nn.init.eye_(part["default"].weight)
    x = torch.ones(8, K, requires_grad=True)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)  # the mask itself
    y.sum().backward()
    assert set(y.unique().tolist()) == {0.0, 2.0} and torch.equal(x.grad, y)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_repeats_the_dropout_mask(use_reentrant):
    model, x = Chain(dropout=0.3), torch.randn(5, K)
    torch.manual_seed(5)
    expected = gradients(model, model, x)
    torch.manual_seed(5)
    again = gradients(model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant), x)
    for actual, value in zip(again, expected, strict=True):
        assert torch.equal(actual, value)


def test_autocast():
    layer, x = lora(), torch.randn(5, K)
    with torch.autocast("cpu", BF16):
        y = layer(x)
        with layer.disable_adapters():
            base = layer(x)
    assert y.dtype == base.dtype == BF16
    assert torch.equal(y, layer(x.bfloat16()))
    y.float().sum().backward()
    assert layer.lora_A["default"].weight.grad.dtype == F32
