"""Nested tensors of both layouts, and tensors of layouts that are not taken."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank_kernels as lk

LAYOUTS = (torch.jagged, torch.strided)


def parts(*lengths, width=64, requires_grad=False, dtype=torch.float32) -> list[torch.Tensor]:
    return [torch.randn(n, width, dtype=dtype).requires_grad_(requires_grad) for n in lengths]


def layer(r=4) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 32))
    lk.replace_linear(model, r=r, progress=False, init_lora_weights=False)
    return model[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("r", [0, 4])
def test_rows_and_gradients(layout, r):
    m, tensors = layer(r), parts(3, 1, 5, requires_grad=True)
    twin, copies = copy.deepcopy(m), [t.detach().clone().requires_grad_() for t in tensors]
    x = torch.nested.as_nested_tensor(tensors, layout=layout)
    y = m(x)
    assert y.is_nested and y.layout == layout and y.dtype == x.dtype
    wanted = [twin(t) for t in copies]
    for got, want in zip(y.unbind(), wanted, strict=True):
        assert torch.allclose(got, want, atol=1e-5)
    dy = [torch.randn_like(t) for t in wanted]
    sum((a * b).sum() for a, b in zip(y.unbind(), dy)).backward()
    sum((a * b).sum() for a, b in zip(wanted, dy)).backward()
    for a, b in zip([*tensors, *m.parameters()], [*copies, *twin.parameters()], strict=True):
        if b.grad is not None:
            assert torch.allclose(a.grad, b.grad, atol=1e-4)
    assert all(t.grad is not None for t in tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_functions(layout):
    tensors = parts(2, 4)
    x = torch.nested.nested_tensor(tensors, layout=layout)
    w, A, B = lk.quantize_4bit(torch.randn(32, 64)), torch.randn(4, 64), torch.randn(32, 4)
    dense = torch.randn(32, 64)
    for function in (
        lambda t: lk.linear_4bit(t, w),
        lambda t: lk.lora_linear_4bit(t, w, A, B, 2.0),
        lambda t: lk.lora_linear(t, dense, A, B, 2.0),
    ):
        for got, want in zip(function(x).unbind(), map(function, tensors), strict=True):
            assert torch.allclose(got, want, atol=1e-4)


def test_a_result_has_the_shape_of_its_input():
    """So that a residual can be added: torch wants the very same offsets."""
    m = nn.Sequential(nn.Linear(64, 64))
    lk.replace_linear(m, progress=False)
    x = torch.nested.nested_tensor(parts(3, 5), layout=torch.jagged)
    assert torch.allclose((x + m(x)).values(), x.values() + m(x.values()), atol=1e-5)


def test_a_view_with_holes():
    values, m = torch.randn(2, 6, 64), layer()
    x = torch.nested.narrow(values, 1, torch.tensor([0, 2]), torch.tensor([3, 4]), torch.jagged)
    for got, want in zip(m(x).unbind(), (values[0, :3], values[1, 2:6]), strict=True):
        assert torch.allclose(got, m(want), atol=1e-5)


def test_more_dimensions():
    m = layer()
    four = [torch.randn(2, n, 64) for n in (3, 5)]
    x = torch.nested.nested_tensor(four, layout=torch.strided)
    for got, want in zip(m(x).unbind(), four, strict=True):
        assert torch.allclose(got, m(want), atol=1e-5)
    heads = torch.nested.nested_tensor(parts(3, 5, width=128), layout=torch.jagged)
    heads = heads.unflatten(-1, [2, 64]).transpose(1, 2)  # [B, heads, ragged, 64]
    y = m(heads)
    for got, want in zip(y.unbind(), heads.unbind(), strict=True):
        assert torch.allclose(got, m(want), atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_under_a_plan_and_autocast(layout):
    model = nn.Sequential(nn.Linear(64, 32))
    lk.replace_linear(model, r=4, progress=False, init_lora_weights=False)
    tensors = parts(3, 5)
    x = torch.nested.nested_tensor(tensors, layout=layout)
    bank = lk.AdapterBank.for_model(model, num_pages=1)
    bank.load("default")
    with bank.using(bank.plan([None, "default"], tokens_per_sequence=[3, 5])), torch.no_grad():
        first, second = model(x).unbind()
    assert torch.allclose(second, model(tensors[1]), atol=1e-5)
    with lk.disable_adapters(model):
        assert torch.allclose(first, model(tensors[0]), atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


def test_under_peft():
    peft = pytest.importorskip("peft", reason="the layers are PEFT's")
    model = nn.Sequential(nn.Linear(64, 32))
    lk.replace_linear(model, r=0, progress=False)
    model = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
    )
    tensors = parts(3, 5)
    for layout in LAYOUTS:
        y = model(torch.nested.nested_tensor(tensors, layout=layout))
        for got, want in zip(y.unbind(), tensors, strict=True):
            assert torch.allclose(got, model(want), atol=1e-5)
        with pytest.raises(
            TypeError, match="expected a dense tensor where adapter_names are given"
        ):
            model.base_model.model[0](
                torch.nested.nested_tensor(tensors, layout=layout), adapter_names=["default"] * 2
            )


def test_what_is_refused():
    m = layer()
    ragged = torch.nested.nested_tensor(
        [torch.randn(64, 3), torch.randn(64, 5)], layout=torch.jagged
    )
    for x, words in (
        (ragged.transpose(1, 2) if ragged._ragged_idx == 1 else ragged, "ragged there|K = 64"),
        (torch.nested.nested_tensor([torch.randn(2, 64), torch.randn(2, 32)]), r"one K, got .*\[32, 64\]"),
        (torch.nested.nested_tensor(parts(2, 3, width=32)), "K = 64"),
        (torch.eye(64).to_sparse(), "expected a dense tensor or a nested one, got .*sparse_coo"),
        (torch.eye(64).to_sparse_csr(), "expected a dense tensor or a nested one, got .*sparse_csr"),
        (torch.eye(64).to_mkldnn(), "expected a dense tensor or a nested one, got .*mkldnn"),
        (torch.zeros(2, 64, dtype=torch.complex64), "x: expected float32, bfloat16 or float16, got"),
        (torch.zeros(2, 64, dtype=torch.float64), "x: expected float32, bfloat16 or float16, got"),
        (torch.zeros(2, 64).to(torch.float8_e4m3fn), "x: expected float32, bfloat16 or float16"),
        (torch.quantize_per_tensor(torch.randn(2, 64), 0.1, 0, torch.qint8), "got torch.qint8"),
        (torch.tensor(1.0), r"\[..., K\] with K = 64, got \(\)"),
        ([1.0], "x: expected a torch.Tensor, got list"),
    ):  # fmt: skip
        for call in (m, layer(0), lambda x: lk.linear_4bit(x, m.weight4bit)):
            with pytest.raises((TypeError, ValueError), match=words):
                call(x)


def test_subclasses_and_lazy_views():
    class Sub(torch.Tensor):
        pass

    m, x = layer(), torch.randn(2, 64)
    assert torch.equal(m(x.as_subclass(Sub)), m(x))
    assert torch.equal(m(torch._neg_view(x)), m(-x))
