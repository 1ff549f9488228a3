"""Which layers' weights a model's code reads: found in the source, however it gets at them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.weight_reads import layers_read, reads_of

D = 64


class Base(nn.Module):
    """Every layer can be read; ``plain`` is only ever called."""

    def __init__(self):
        super().__init__()
        self.plain, self.read = nn.Linear(D, D), nn.Linear(D, D)
        self.many = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.named = nn.ModuleDict({"a": nn.Linear(D, D), "b": nn.Linear(D, D)})
        self.norm = nn.LayerNorm(D)

    def init_weights(self):
        self.plain.weight.data.normal_()

    def tie_weights(self):
        self.plain.weight = self.read.weight


class Directly(Base):
    def forward(self, x):
        return self.plain(x) @ self.read.weight.T


class ItsDtype(Base):
    def forward(self, x):
        return self.read(x.to(self.read.weight.dtype))


class ThroughAVariable(Base):
    def forward(self, x):
        layer = self.read
        y = self.plain(x)
        return F.linear(y, layer.weight)


class ThroughGetattr(Base):
    def forward(self, x):
        return F.linear(self.plain(x), getattr(getattr(self, "read"), "weight"))  # noqa: B009


class InALoop(Base):
    def forward(self, x):
        for i, layer in enumerate(self.many):
            x = F.linear(x, layer.weight) + i
        return self.plain(x)


class InAComprehension(Base):
    def forward(self, x):
        W = torch.cat([layer.weight for layer in self.many])
        return self.plain(x) @ W.T


class BySubscript(Base):
    def forward(self, x):
        return self.plain(x) @ self.many[1].weight


class OfADictionary(Base):
    def forward(self, x):
        for layer in self.named.values():
            x = x @ layer.weight
        return self.plain(x)


class InAMethod(Base):
    def product(self, x, layer):
        return x @ layer.weight

    def forward(self, x):
        return self.product(self.plain(x), layer=self.read)


def product(x, layer):
    return x @ layer.weight


class InAFunction(Base):
    def forward(self, x):
        return product(self.plain(x), self.read)


class InheritedMethod(Directly):
    pass


class Harmless(Base):
    def forward(self, x):
        x = x.to(self.read.weight.device) if self.plain.weight.requires_grad else x
        return self.norm(self.plain(x)) * self.norm.weight


class CallsAnew(Directly):
    def forward(self, x):
        return self.plain(self.read(x))


class OfAChild(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Base()

    def forward(self, x):
        return self.inner.plain(x) @ self.inner.read.weight


CASES = {
    Directly: {"read"},
    ItsDtype: {"read"},
    ThroughAVariable: {"read"},
    ThroughGetattr: {"read"},
    InALoop: {"many.0", "many.1"},
    InAComprehension: {"many.0", "many.1"},
    BySubscript: {"many.1"},
    OfADictionary: {"named.a", "named.b"},
    InAMethod: {"read"},
    InAFunction: {"read"},
    InheritedMethod: {"read"},
    Harmless: set(),
    CallsAnew: set(),
    OfAChild: {"inner.read"},
}


@pytest.mark.parametrize("cls", CASES)
def test_what_is_read(cls):
    model = cls()
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    found = linears & layers_read(model).keys()
    assert found == CASES[cls]
    report = lk.replace_linear(model, r=0, progress=False)
    assert {layer.name for layer in report.replaced} == linears - CASES[cls]
    reasons = {layer.name: layer.reason for layer in report.skipped}
    assert all(reasons[name].startswith("its weight is read by ") for name in CASES[cls])
    x = torch.randn(3, D)
    for name in linears - CASES[cls]:
        layer = model.get_submodule(name)
        dense = nn.Linear(D, D)
        dense.weight.data, dense.bias = layer.dequantize(), layer.bias
        model.set_submodule(name, dense)
        expected = model(x)
        model.set_submodule(name, layer)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_a_class_without_source():
    """As of a class typed into an interpreter: what is named beside "weight" counts as read."""
    scope = {"nn": nn, "Base": Base}
    exec("class Typed(Base):\n    def forward(self, x): return x @ self.read.weight", scope)
    assert layers_read(scope["Typed"]()).keys() == {"read"}


def test_torch_layers():
    layer = nn.TransformerEncoderLayer(D, 4, D)
    assert {"linear1", "linear2", "self_attn.out_proj"} <= layers_read(layer).keys()
    assert not [path for path, _ in reads_of(nn.TransformerDecoderLayer)]


@pytest.mark.parametrize("r", [0, 4])
def test_the_fast_path_of_an_encoder(r):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 4, D, batch_first=True), 2)
    model = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(D, D)}).eval()
    x, pad = torch.randn(2, 5, D), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        before = model.encoder(x, src_key_padding_mask=pad)
        report = lk.replace_linear(model, r=r, progress=False)
        assert torch.equal(model.encoder(x, src_key_padding_mask=pad), before)
    assert [layer.name for layer in report.replaced] == ["head"]
    with pytest.warns(UserWarning, match="nothing was replaced: layers.0.*read by Transformer"):
        report = lk.replace_linear(encoder, r=r, progress=False)
    assert report.replaced == []
    assert "linear1" in str(report)
