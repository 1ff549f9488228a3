"""Derivatives that are not implemented raise an error: of gradients, and in forward mode. They are never zeros."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fw
from torch.autograd import functional as AF

import lowrank_kernels as lk
from banks import make_bank, make_model

N, K, R = 8, 64, 4
W = lk.quantize_4bit(torch.randn(N, K))
A, B, BIAS = torch.randn(R, K), torch.randn(N, R), torch.randn(N)
DENSE = torch.randn(N, K)


def layer():
    made = lk.LoRALinear4bit.from_weight(W)
    made.add_adapter("default", r=R, init_lora_weights=False)
    return made


def planned(function):
    """``function(model, bank)(x)`` of a model of which each row has its adapter."""
    model = make_model()
    bank = make_bank(model)
    return function(model, bank)


def under_a_plan(model, bank):
    def run(x):
        with bank.using(bank.plan(["a", "b"])):
            return model(x)

    return run


def in_place(model, bank):
    return lambda x: lk.multi_lora_(x.new_zeros(2, 96), x, bank.plan(["a", "b"]), bank["up"])


# Functions of x [2, K].
OF_X = {
    "linear_4bit": lambda x: lk.linear_4bit(x, W),
    "lora_linear_4bit": lambda x: lk.lora_linear_4bit(x, W, A, B),
    "dropout": lambda x: lk.lora_linear_4bit(x, W, A, B, dropout_p=0.1),
    "lora_linear": lambda x: lk.lora_linear(x, DENSE, A, B),
    "Linear4bit": lk.Linear4bit.from_weight(W),
    "LoRALinear4bit": layer(),
    "under a plan": planned(under_a_plan),
    "multi_lora_": planned(in_place),
}
# The same of another input.
OF_OTHERS = {
    "bias": (BIAS, lambda b: lk.linear_4bit(torch.ones(2, K), W, b)),
    "A": (A, lambda a: lk.lora_linear_4bit(torch.ones(2, K), W, a, B)),
    "B": (B, lambda b: lk.lora_linear_4bit(torch.ones(2, K), W, A, b)),
    "A of a dense base": (A, lambda a: lk.lora_linear(torch.ones(2, K), DENSE, a, B)),
    "a dense base": (DENSE, lambda w: lk.lora_linear(torch.ones(2, K), w, A, B)),
}
INPUTS = {name: (torch.randn(2, K), f) for name, f in OF_X.items()} | OF_OTHERS
each = pytest.mark.parametrize("name", INPUTS)


def penalty(f, v):
    """A loss and a penalty on its gradient."""
    v = v.clone().requires_grad_()
    loss = f(v).square().sum()
    (g,) = torch.autograd.grad(loss, v, create_graph=True)
    torch.autograd.grad(loss + g.square().sum(), v)


def backwards(f, v):
    v = v.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(v).square().sum(), v, create_graph=True)
    g.square().sum().backward()


SECOND = {
    "hessian": lambda f, v: AF.hessian(lambda v: f(v).square().sum(), v),
    "hvp": lambda f, v: AF.hvp(lambda v: f(v).square().sum(), v, torch.ones_like(v)),
    "vhp": lambda f, v: AF.vhp(lambda v: f(v).square().sum(), v, torch.ones_like(v)),
    "jvp by double backward": lambda f, v: AF.jvp(f, v, torch.ones_like(v)),
    "penalty": penalty,
    "backward": backwards,
}


@each
@pytest.mark.parametrize("way", SECOND)
def test_gradients_of_gradients(name, way):
    v, f = INPUTS[name]
    with pytest.raises(RuntimeError, match="differentiate twice"):
        SECOND[way](f, v)


def test_of_a_gradient_that_depends_on_the_adapter_alone():
    """dy is constant; dx depends on A and B."""
    x, a = torch.randn(2, K, requires_grad=True), A.clone().requires_grad_()
    (dx,) = torch.autograd.grad(lk.lora_linear_4bit(x, W, a, B).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.grad(dx.sum(), a)


def test_first_order_with_create_graph_is_right():
    """As libraries ask for it that need no second derivative."""
    x = torch.randn(2, K, requires_grad=True)
    expected = torch.autograd.grad(lk.linear_4bit(x, W, BIAS).square().sum(), x)[0]
    made = torch.autograd.grad(lk.linear_4bit(x, W, BIAS).square().sum(), x, create_graph=True)[0]
    assert torch.equal(made, expected)
    # dx of a constant dy is a constant: it has no derivative, as for a dense layer.
    (dx,) = torch.autograd.grad(lk.linear_4bit(x, W).sum(), x, create_graph=True)
    assert not dx.requires_grad
    jacobian = AF.jacobian(lambda x: lk.linear_4bit(x, W), x.detach())
    torch.testing.assert_close(jacobian[0, :, 0], W.dequantize(), rtol=0, atol=1e-5)
    fast = AF.jacobian(lambda x: lk.linear_4bit(x, W), x.detach(), vectorize=True)
    assert torch.equal(fast, jacobian)


def dual(f, v):
    with fw.dual_level():
        f(fw.make_dual(v, torch.ones_like(v)))


FORWARD = {
    "jvp": lambda f, v: torch.func.jvp(f, (v,), (torch.ones_like(v),)),
    "jacfwd": lambda f, v: torch.func.jacfwd(f)(v),
    "linearize": lambda f, v: torch.func.linearize(f, v)[1](torch.ones_like(v)),
    "jacobian": lambda f, v: AF.jacobian(f, v, vectorize=True, strategy="forward-mode"),
    "jvp of vmap": lambda f, v: torch.func.jvp(
        lambda v: torch.vmap(f)(v[None]), (v,), (torch.ones_like(v),)
    ),
    "dual level": dual,
    "hessian": lambda f, v: torch.func.hessian(lambda v: f(v).square().sum())(v),
}
MESSAGE = "forward-mode derivatives .* not implemented|gradients under torch.func transforms"


@each
@pytest.mark.parametrize("way", FORWARD)
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode(name, way, grad):
    v, f = INPUTS[name]
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=MESSAGE):
        FORWARD[way](f, v)


def test_a_layer_beside_what_has_tangents():
    """Within a dual level a layer whose inputs have none works."""
    x, y = torch.randn(2, K), torch.randn(2, N)
    expected = lk.linear_4bit(x, W)
    with fw.dual_level(), torch.no_grad():
        out = fw.unpack_dual(fw.make_dual(y, y) * lk.linear_4bit(x, W))
    assert torch.equal(out.tangent, y * expected)
