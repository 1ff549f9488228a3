"""Linear4bit as a module: numbers, state dict, devices, casts, copies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lowrank_kernels import quantize_4bit, reference
from lowrank_kernels.nn import Linear4bit, LoRALinear4bit, Params4bit
from tolerance import assert_close, assert_same_bits, check

F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
K, N, R = 96, 33, 4


def linear(bias: bool = True, dtype: torch.dtype = F32) -> nn.Linear:
    return nn.Linear(K, N, bias=bias, dtype=dtype)


def lora(dtype: torch.dtype = F32, **arguments) -> LoRALinear4bit:
    """A layer whose adapter does something: B is not zero."""
    defaults = {"r": R, "lora_alpha": 8, "init_lora_weights": False}
    return LoRALinear4bit.from_linear(linear(dtype=dtype), **(defaults | arguments))


def same_weight(layer: Linear4bit, w) -> None:
    for name, tensor in w.tensors().items():
        assert_same_bits(name, getattr(layer.weight4bit, name), tensor)
    assert layer.weight4bit.tensors().keys() == w.tensors().keys()


# -- Linear4bit: numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("bias_dtype", [None, F32, BF16])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_forward_and_gradients(dtype, bias_dtype):
    layer = Linear4bit.from_linear(linear(bias_dtype is not None))
    if bias_dtype is not None:
        layer.to(bias_dtype)
    x = torch.randn(2, 3, K).to(dtype).requires_grad_()
    y = layer(x)
    assert y.shape == (2, 3, N) and y.dtype == dtype
    args = (x.detach().flatten(0, 1), *layer.weight4bit.op_args())
    bias = None if layer.bias is None else layer.bias.detach()
    check("linear_4bit", (*args, bias), y.flatten(0, 1))

    dy = torch.randn_like(y)
    y.backward(dy)
    check("linear_4bit_dx", (dy.flatten(0, 1), *args[1:]), x.grad.flatten(0, 1))
    if bias is not None:
        rows = dy.double().flatten(0, 1)
        assert layer.bias.grad.dtype == bias_dtype
        assert_close("dbias", layer.bias.grad, rows.sum(0), rows.abs().sum(0))


def test_from_linear_keeps_what_it_should():
    dense = linear().eval()
    dense.bias.requires_grad_(False)
    layer = Linear4bit.from_linear(dense, "fp4", 128, False, BF16)
    same_weight(layer, quantize_4bit(dense.weight, "fp4", 128, False, BF16))
    assert layer.bias is dense.bias and not layer.training and not layer.weight.requires_grad
    assert (layer.quant_type, layer.blocksize, layer.double_quant) == ("fp4", 128, False)
    assert (layer.in_features, layer.out_features) == (K, N)
    assert "quant_type=fp4, blocksize=128, double_quant=False" in repr(layer)
    again = LoRALinear4bit.from_linear(layer, r=2)  # no second quantization
    assert again.weight.data_ptr() == layer.weight.data_ptr()
    assert (again.quant_type, again.blocksize) == ("fp4", 128)


def test_a_fresh_layer_is_nn_linear_quantized():
    torch.manual_seed(3)
    dense = nn.Linear(K, N, dtype=BF16)
    torch.manual_seed(3)
    layer = Linear4bit(K, N, dtype=BF16)
    same_weight(layer, quantize_4bit(dense.weight))
    assert torch.equal(layer.bias, dense.bias)
    assert layer.dequantize().dtype == BF16 and layer.dequantize(F32).dtype == F32
    torch.manual_seed(3)
    layer.reset_parameters()
    same_weight(layer, quantize_4bit(dense.weight))
    assert torch.equal(layer.bias, dense.bias)
    assert Linear4bit(K, N, bias=False).bias is None


def test_w_q_is_the_weight():
    layer = Linear4bit.from_linear(linear())
    assert layer.W_q is layer.weight
    expected = reference.dequantize_4bit(*layer.weight4bit.op_args())
    assert torch.equal(layer.dequantize(), expected)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Linear4bit.from_linear(nn.Conv1d(1, 1, 1)), TypeError, "linear: expected a torch"),
        (
            lambda: Linear4bit.from_linear(linear(dtype=torch.float64)),
            TypeError,
            "weight: expected",
        ),
        (lambda: Linear4bit(K, N, blocksize=63), ValueError, "blocksize: expected one of"),
        (lambda: Linear4bit(K, N, quant_type="nf3"), ValueError, "quant_type: expected one of"),
        (lambda: Linear4bit(K, N, quant_storage=torch.int8), ValueError, "quant_storage: expected"),
        (lambda: Linear4bit.from_weight(torch.ones(2, 2)), TypeError, "w: expected a Weight4bit"),
        (
            lambda: Linear4bit.from_weight(quantize_4bit(torch.ones(3, 64)), torch.ones(2)),
            ValueError,
            r"bias: expected shape \[N\] = \(3,\), got \(2,\)",
        ),
    ],
)
def test_constructor_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


# -- state dict ------------------------------------------------------------------------------------


BNB_K = 256  # bitsandbytes' AVX-512 dequantize is wrong where blocks cross rows


def bitsandbytes_layer(quant_type="nf4", blocksize=64, double_quant=True, storage=U8, dtype=F32):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is the oracle of the format")
    weight = torch.randn(N, BNB_K, dtype=dtype)
    layer = bnb.nn.Linear4bit(
        BNB_K, N, quant_type=quant_type, compress_statistics=double_quant, quant_storage=storage
    )
    layer.weight = bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        blocksize=blocksize,
        compress_statistics=double_quant,
        quant_type=quant_type,
        quant_storage=storage,
        module=layer,
    )
    return layer.to("cpu")  # quantizes


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"quant_type": "fp4", "blocksize": 128},
        {"double_quant": False, "dtype": BF16},
        {"storage": BF16, "dtype": BF16},
        {"storage": F16, "double_quant": False},
        {"storage": F32, "blocksize": 32},
    ],
    ids=str,
)
def test_bitsandbytes_state_dict_round_trip(settings, assign):
    theirs = bitsandbytes_layer(**settings)
    state = theirs.state_dict()
    ours = Linear4bit(BNB_K, N, quant_type="fp4", blocksize=256, double_quant=False)
    ours.load_state_dict(state, assign=assign)
    back = ours.state_dict()
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert_same_bits(key, back[key], tensor)
    assert ours.weight.dtype == settings.get("storage", U8)
    assert ours.dequantize().dtype == settings.get("dtype", F32)
    assert (ours.weight.data_ptr() == state["weight"].data_ptr()) == assign

    import bitsandbytes.functional as bnb

    expected = bnb.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert_same_bits("dequantize", ours.dequantize(), expected)


def test_the_other_orientation_is_kept():
    state = Linear4bit.from_linear(linear()).state_dict()
    state["weight"] = state["weight"].view(1, -1)
    layer = Linear4bit(K, N)
    layer.load_state_dict(state)
    assert layer.weight.shape == (1, N * K // 2)
    assert_same_bits("weight", layer.state_dict()["weight"], state["weight"])
    assert layer(torch.randn(2, K)).shape == (2, N)


def test_a_checkpoint_file_of_layers_that_share_tables(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    first = Linear4bit.from_linear(linear())
    second = Linear4bit.from_linear(linear())
    second.quant_map, second.nested_quant_map = first.quant_map, first.nested_quant_map
    model = nn.ModuleDict({"a": first, "b": nn.Sequential(second, nn.LayerNorm(N))})
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert second.weight4bit.code is first.weight4bit.code

    fresh = nn.ModuleDict(
        {"a": Linear4bit(K, N), "b": nn.Sequential(Linear4bit(K, N), nn.LayerNorm(N))}
    )
    fresh.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    same_weight(fresh["a"], first.weight4bit)
    same_weight(fresh["b"][0], second.weight4bit)


@pytest.mark.parametrize("assign", [False, True])
def test_a_dense_weight_is_quantized_when_loaded(assign):
    dense = linear(dtype=BF16)
    layer = Linear4bit(K, N, quant_type="fp4", blocksize=32, quant_storage=BF16)
    layer.load_state_dict(dense.state_dict(), assign=assign)
    same_weight(layer, quantize_4bit(dense.weight, "fp4", 32, True, BF16))
    assert layer.dequantize().dtype == BF16


def _without(key):
    return lambda state: state.pop(key)


def _with(key, value):
    return lambda state: state.update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("weight.absmax"), r"state_dict\['p.weight.absmax'\]: expected a tensor"),
        (_without("weight"), r"state_dict\['p.weight'\]: expected a tensor"),
        (_with("weight.absmax", torch.zeros(5, dtype=U8)), r"p.weight.absmax: expected contiguous"),
        (_with("weight.other", torch.zeros(1)), "p.weight.other"),
        (_with("weight", torch.zeros(7, 1, dtype=U8)), r"p.weight: expected \d+ contiguous bytes"),
        (
            lambda state: state.update(Linear4bit(N, K).state_dict()),
            r"p.weight: expected shape \[out_features, in_features\] = \(33, 96\), got \(96, 33\)",
        ),
        (
            lambda state: [state.pop(k) for k in list(state) if k.startswith("weight.")],
            r"p.weight: expected a float32.*got torch.uint8 of shape \(1584, 1\) alone",
        ),
        (
            lambda state: (state.clear(), state.update(nn.Linear(K, N + 1).state_dict())),
            r"p.weight: expected a float32.*got torch.float32 of shape \(34, 96\) alone",
        ),
        (
            lambda state: (state.clear(), state.update(weight=torch.full((N, K), torch.nan))),
            r"p.weight: .*expected finite values, got nan at index \(0, 0\)",
        ),
        (lambda state: state.clear(), r"Missing key.*\"p.weight\", \"p.bias\""),
        (_with("absmax", torch.zeros(1)), r"Unexpected key.*\"p.absmax\""),
    ],
)
def test_a_malformed_state_dict_is_refused(change, message):
    state = Linear4bit.from_linear(linear()).state_dict()
    change(state)
    model = nn.ModuleDict({"p": Linear4bit(K, N)})
    before = model["p"].weight4bit
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict({f"p.{key}": value for key, value in state.items()})
    if "Unexpected" not in message:  # then torch reports it after loading the rest
        assert model["p"].weight4bit is before


def test_load_not_strict_without_a_weight_keeps_it():
    layer = Linear4bit(K, N)
    before, bias = layer.weight4bit, torch.randn(N)
    layer.load_state_dict({"bias": bias}, strict=False)
    assert layer.weight4bit is before and torch.equal(layer.bias, bias)


# -- devices, casts, copies ------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [U8, BF16, F32])
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to(BF16),
        lambda m: m.type(F16),
        lambda m: m.to("cpu", F16),
        lambda m: m.share_memory(),
        lambda m: nn.Sequential(m).bfloat16(),
    ],
    ids=["half", "double", "to", "type", "to_device", "share_memory", "in_a_model"],
)
def test_casts_leave_bytes_and_statistics(cast, storage):
    layer = lora(quant_storage=storage)
    layer.merge()
    original, merged = copy.deepcopy(layer._unmerged), copy.deepcopy(layer.weight4bit)
    dtypes = {p.dtype for p in layer.lora_A.parameters()}
    cast(layer)
    same_weight(layer, merged)
    changed = {p.dtype for p in (layer.bias, *layer.lora_A.parameters())}
    assert layer.weight.is_shared() == (
        changed == dtypes
    )  # share_memory is the one that keeps dtypes
    assert type(layer.weight) is Params4bit and len(changed) == 1
    layer.unmerge()
    same_weight(layer, original)


def test_to_another_device_takes_everything_along():
    layer = lora()
    layer.merge()
    layer.to("meta")
    assert layer.weight4bit.device.type == layer._unmerged.device.type == "meta"
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    assert type(layer.weight) is Params4bit


def copies():
    def saved(module):
        file = io.BytesIO()
        torch.save(module, file)
        return torch.load(io.BytesIO(file.getvalue()), weights_only=False)

    return {
        "deepcopy": copy.deepcopy,
        "copy": copy.copy,
        "pickle": lambda module: pickle.loads(pickle.dumps(module)),
        "torch.save": saved,
    }


@pytest.mark.parametrize("method", copies())
@pytest.mark.parametrize("storage", [U8, BF16])
def test_copies_work(method, storage):
    layer = lora(quant_storage=storage)
    other = copies()[method](layer)
    same_weight(other, layer.weight4bit)
    assert type(other.weight) is Params4bit and other.weight4bit.packed is other.weight
    assert (other.weight.data_ptr() == layer.weight.data_ptr()) == (method == "copy")
    x = torch.randn(2, K)
    assert torch.equal(other(x), layer(x))


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_meta_device():
    state = lora().state_dict()
    layer = LoRALinear4bit(K, N, r=R, device="meta")
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    assert {k: v.shape for k, v in layer.state_dict().items() if "quant_state" not in k} == {
        k: v.shape for k, v in state.items() if "quant_state" not in k
    }
    assert layer(torch.empty(2, K, device="meta")).shape == (2, N)

    with pytest.warns(UserWarning, match="weight: this layer is on the meta device"):
        layer.load_state_dict(state)
    assert layer.weight.is_meta

    layer.load_state_dict(state, assign=True)
    emptied = LoRALinear4bit(K, N, r=R, device="meta").to_empty(device="cpu")
    emptied.load_state_dict(state)
    for module in (layer, emptied):
        for key, tensor in state.items():
            assert_same_bits(key, module.state_dict()[key], tensor)
    with torch.device("meta"):
        assert LoRALinear4bit.from_linear(linear(), r=R).weight4bit.nested_offset.is_meta


@pytest.mark.parametrize("storage", [U8, BF16])
def test_requires_grad_passes_over_the_packed_weight(storage):
    model = nn.Sequential(Linear4bit.from_linear(linear(), quant_storage=storage))
    model.requires_grad_(False)
    model.requires_grad_(True)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.bias"]
    model(torch.randn(2, K)).sum().backward()


def test_tensors_put_in_from_outside_are_used():
    layer, other = Linear4bit.from_linear(linear()), Linear4bit.from_linear(linear())
    x = torch.randn(2, K)
    layer(x)
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert torch.equal(torch.func.functional_call(layer, state, x), other(x))
    before = layer(x)
    layer.weight = nn.Parameter(other.weight.data, requires_grad=False)
    assert not torch.equal(layer(x), before)
    layer.absmax = layer.absmax[:-1]
    with pytest.raises(ValueError, match=r"weight\.absmax: expected contiguous"):
        layer(x)
