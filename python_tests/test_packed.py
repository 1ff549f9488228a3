"""Utilities that average, cast, count or move parameters leave the packed bytes of a 4-bit weight as they are."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

import lowrank_kernels as lk
from lowrank_kernels.packed import PackedBytes, PackedNumbers, Params4bit, plain
from tolerance import assert_same_bits

STORAGES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)


def net(storage=torch.uint8, **arguments) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 32))
    arguments = {"r": 4, "init_lora_weights": False} | arguments
    lk.replace_linear(model, progress=False, quant_storage=storage, **arguments)
    return model.to(storage if storage.is_floating_point else torch.float32)


def bytes_of(model: nn.Module) -> list[torch.Tensor]:
    return [plain(p).clone() for p in model.parameters() if isinstance(p, Params4bit)]


def assert_bytes(model: nn.Module, before: list[torch.Tensor]) -> None:
    after = bytes_of(model)
    assert len(after) == len(before) > 0
    for a, b in zip(after, before):
        assert_same_bits("packed", a.view(torch.uint8), b.view(torch.uint8))


# -- averages --------------------------------------------------------------------------------------

AVERAGES = {
    "ema": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
    "ema_one_by_one": {"avg_fn": swa_utils.get_ema_avg_fn(0.9)},
    "swa": {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
    "swa_one_by_one": {"avg_fn": swa_utils.get_swa_avg_fn()},
    "default": {},
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("how", AVERAGES.values(), ids=AVERAGES)
def test_averaged_model(storage, how):
    """Bytes of the average are those of the model; what trains is averaged as ever."""
    model = net(storage)
    before = bytes_of(model)
    average = swa_utils.AveragedModel(model, **how)
    dense = [p.detach().clone() for p in model.parameters() if not isinstance(p, Params4bit)]
    expected = swa_utils.AveragedModel(nn.ParameterList(dense), **how)
    for _ in range(4):
        with torch.no_grad():
            for a, b in zip(
                (p for p in model.parameters() if not isinstance(p, Params4bit)), dense
            ):
                a.mul_(1.5)
                b.copy_(a)
        average.update_parameters(model)
        expected.update_parameters(nn.ParameterList(dense))
    assert_bytes(model, before)
    assert_bytes(average, before)
    got = [p for p in average.parameters() if not isinstance(p, Params4bit)]
    for a, b in zip(got, expected.parameters(), strict=True):
        assert torch.equal(a, b)
    x = torch.randn(2, 64, dtype=got[0].dtype)
    swa_utils.update_bn([x], average)
    assert torch.isfinite(average(x)).all()


def _data_lerp(ema, model):  # ema_pytorch
    for a, b in zip(ema.parameters(), model.parameters()):
        a.data.lerp_(b.data, 0.1)


def _data_assigned(ema, model):
    for a, b in zip(ema.parameters(), model.parameters()):
        a.data = 0.9 * a.data + 0.1 * b.data


def _parameters(ema, model):
    for a, b in zip(ema.parameters(), model.parameters()):
        a.mul_(0.9).add_(b, alpha=0.1)


def _operators(ema, model):
    for a, b in zip(ema.parameters(), model.parameters()):
        a *= 0.9
        a += 0.1 * b


def _differences(ema, model):  # torch_ema
    for a, b in zip(ema.parameters(), model.parameters()):
        difference = a - b
        difference.mul_(0.1)
        a.sub_(difference)


def _copied(ema, model):
    for a, b in zip(ema.parameters(), model.parameters()):
        a.copy_(a * 0.9 + b.detach() * 0.1)


def _in_float32(ema, model):
    for a, b in zip(ema.parameters(), model.parameters()):
        a.data.copy_(a.data.float() * 0.9 + b.data.float() * 0.1)


def _foreach(ema, model):
    own = [p.detach() for p in ema.parameters()]
    other = [p.detach() for p in model.parameters()]
    for dtype in {p.dtype for p in own}:
        a, b = ([p for p in ps if p.dtype == dtype] for ps in (own, other))
        torch._foreach_mul_(a, 0.9)
        torch._foreach_add_(a, torch._foreach_mul(b, 0.1))


BY_HAND = (_data_lerp, _data_assigned, _parameters, _operators, _differences, _copied)
BY_HAND = (*BY_HAND, _in_float32, _foreach)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("update", BY_HAND)
def test_averages_by_hand(storage, update):
    model = net(storage)
    before, ema = bytes_of(model), copy.deepcopy(model)
    norm = [p.detach().clone() for p in model[1].parameters()]
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.add_(1)
        for _ in range(3):
            update(ema, model)
    assert_bytes(ema, before)
    assert_bytes(model, before)
    for a, b in zip(ema[1].parameters(), norm):  # 1 - 0.9³ of the way
        assert torch.allclose(a, b + 0.271, atol=0.02)


@torch.no_grad()
@pytest.mark.parametrize("storage", (torch.uint8, torch.bfloat16))
@pytest.mark.parametrize("update", BY_HAND)
def test_averages_of_different_bytes_are_refused(storage, update):
    """Of a merged model and one that is not, say. Nothing is written to the bytes."""
    model, ema = net(storage), net(storage)
    before = bytes_of(ema)
    with pytest.raises(
        (ValueError, TypeError), match=r"packed bytes .*p for p in model.parameters"
    ):
        update(ema, model)
    assert_bytes(ema, before)


def test_shadow_copies():
    """diffusers' EMAModel, torch_ema: a list of copies, averaged and copied back."""
    model = net(torch.bfloat16)
    before = bytes_of(model)
    with torch.no_grad():
        shadow = [p.clone().detach() for p in model.parameters()]
        for s, p in zip(shadow, model.parameters()):
            s.sub_(0.1 * (s - p))
        torch._foreach_copy_([p.data for p in model.parameters()], shadow)
        for s, p in zip(shadow, model.parameters()):
            p.data.copy_(s.to(p.device).data)
    assert_bytes(model, before)


# -- reading ---------------------------------------------------------------------------------------


def test_what_is_read_is_true():
    """Numbers that are only looked at are those of a tensor of bytes."""
    weight = net()[0].weight
    raw = plain(weight)
    assert type(raw) is torch.Tensor and raw.data_ptr() == weight.data_ptr()
    assert torch.equal(weight.detach() * 2, raw.float() * 2)
    assert torch.equal(weight - weight.data, torch.zeros_like(raw, dtype=torch.float32))
    assert (weight.data - net()[0].weight.data).abs().max() > 0
    assert torch.equal(weight.data, raw) and (weight.detach().numpy() == raw.numpy()).all()
    assert weight.data.float().norm() == raw.float().norm()
    assert isinstance(weight.detach(), PackedBytes) and isinstance(weight * 2, PackedNumbers)
    assert weight.detach().data_ptr() == weight.data_ptr()
    for made in (weight.detach(), weight.data, weight.clone(), weight * 2):
        assert type(pickle.loads(pickle.dumps(made))) is torch.Tensor
        assert torch.equal(copy.deepcopy(made), made)
    again = pickle.loads(pickle.dumps(weight))
    assert type(again) is Params4bit and torch.equal(again, weight)


def test_state_dicts_hold_tensors_of_torchs_own_class():
    model = net()
    for key, value in model.state_dict().items():
        assert type(value) is torch.Tensor, key
    assert model.state_dict(keep_vars=True)["0.weight"] is model[0].weight
    vector = nn.utils.parameters_to_vector(model.parameters())
    assert vector.numel() == sum(p.numel() for p in model.parameters())


# -- writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
def test_whole_bytes_are_written(storage):
    """As DistributedDataParallel, torch.distributed.checkpoint and hot swaps do."""
    model, other = net(storage), net(storage)
    wanted = bytes_of(other)
    with torch.no_grad():
        model[0].weight.detach().copy_(other[0].weight)
        model[2].weight.data = plain(other[2].weight).clone()
    assert_bytes(model, wanted)
    with torch.no_grad():
        model[0].weight.copy_(other[0].weight.detach().clone())
        model[2].weight.data.copy_(other[2].weight.data)
    assert_bytes(model, wanted)
    model[0].weight = nn.Parameter(other[0].weight.data, requires_grad=False)
    assert torch.equal(
        model(torch.ones(1, 64, dtype=model[1].weight.dtype)).isfinite().all(), torch.tensor(True)
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.zero_(),
        lambda p: p.data.zero_(),
        lambda p: p.detach().fill_(3),
        lambda p: nn.init.normal_(p),
        lambda p: p.data.normal_(0, 0.02),
        lambda p: p.data.clamp_(0, 1),
        lambda p: p.data.copy_(torch.ones(p.shape, dtype=torch.float64)),
        lambda p: p.data.copy_(torch.ones(3, 1, dtype=p.dtype)),
        lambda p: p.copy_(torch.ones(p.shape)[:-1]),
        lambda p: p.data.add_(torch.ones(p.shape, dtype=p.dtype)),
        lambda p: p.data.__setitem__(0, 1),
        lambda p: setattr(p, "data", torch.full(p.shape, 0.3, dtype=torch.float64)),
        lambda p: setattr(p, "data", p.data.view(-1)[:-1].to(torch.float64)),
        lambda p: torch.add(p.detach(), 1, out=p.detach()),
    ],
)
def test_everything_else_that_writes_is_refused(write):
    for storage in (torch.uint8, torch.bfloat16):
        model = net(storage)
        before = bytes_of(model)
        with pytest.raises(TypeError, match="packed bytes of a 4-bit weight: expected whole bytes"):
            write(model[0].weight)
        assert_bytes(model, before)


@pytest.mark.parametrize("storage", STORAGES)
def test_casts_are_passed_over(storage):
    model = net(storage)
    before = bytes_of(model)
    for cast in (torch.float32, torch.bfloat16):
        model.to(cast)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(cast)
    model.half().float()
    assert_bytes(model, before)
    assert model[0].weight.dtype == storage


def test_gradients_and_their_utilities():
    model = net()
    before = bytes_of(model)
    for parameter in model.parameters():
        parameter.requires_grad = True
    assert not model[0].weight.requires_grad and model[1].weight.requires_grad
    model.requires_grad_(True)
    model(torch.randn(3, 64)).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    nn.utils.clip_grad_value_(model.parameters(), 1.0)
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1).step()
    assert_bytes(model, before)
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector, model.parameters())
    assert_bytes(model, before)
    with pytest.raises(TypeError, match="packed bytes of a 4-bit weight"):
        nn.utils.vector_to_parameters(vector + 1, model.parameters())
    assert_bytes(model, before)


def test_kernels_get_the_parameter_itself():
    """torch asks Python about a class with a __torch_function__ of its own, at every call."""
    assert Params4bit.__torch_function__ is torch._C._disabled_torch_function_impl
    assert type(net()[0].weight4bit.op_args()[0]) is Params4bit
