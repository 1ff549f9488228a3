"""Every kind of layer under PyTorch's machinery: compile, export, autocast, checkpointing, copies, func, replicas.

Operators under ``opcheck`` are in test_schema.py, the functions in test_functional.py.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import importlib
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lk
from tolerance import assert_same_bits

replicate_module = importlib.import_module(
    "torch.nn.parallel.replicate"
)  # its package has a function of that name
F32, BF16 = torch.float32, torch.bfloat16
K = 96
KINDS = ("linear", "lora", "merged", "disabled", "plan")
each_kind = pytest.mark.parametrize("kind", KINDS)
without_plan = pytest.mark.parametrize("kind", KINDS[:-1])  # a plan belongs to a block of code


class Model(nn.Module):
    """Two layers of a kind; ``self(x)`` makes the plan for x's rows, where the kind has one."""

    def __init__(self, kind: str, dropout: float = 0.0):
        super().__init__()
        dense = nn.Sequential(nn.Linear(K, 64), nn.Tanh(), nn.Linear(64, K, bias=False))
        r = 0 if kind == "linear" else 4
        lk.replace_linear(dense, r=r, lora_dropout=dropout, init_lora_weights=False, progress=False)
        self.layers, self.kind = dense, kind
        if kind == "merged":
            dense[0].merge()
            dense[2].merge()
        if kind == "disabled":
            dense[0].disable_adapters()
            dense[2].disable_adapters()
        if kind == "plan":
            self.bank = lk.AdapterBank.for_model(dense, num_pages=4)
            self.bank.load("default")

    def using(self, x: torch.Tensor):
        """For the block with a forward and its backward."""
        if self.kind != "plan":
            return contextlib.nullcontext()
        rows = x.shape[:-1].numel()
        return self.bank.using(self.bank.plan(["default", None], [rows - rows // 2, rows // 2]))

    def forward(self, x):
        return self.layers(x)


def trained(model: Model, x: torch.Tensor, run=None) -> list[torch.Tensor]:
    """y and all gradients."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    with model.using(x):
        y = model(leaf) if run is None else run(leaf)
        y.float().square().sum().backward()
    return [y.detach(), leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


# Of each kind: y, dx, and dbias (linear) or dA, dB of both layers (where adapters act).
GRADIENTS = {"linear": 3, "lora": 6, "merged": 2, "disabled": 2, "plan": 6}


# -- torch.compile -----------------------------------------------------------------------------------


@each_kind
def test_compiles_whole_and_once_for_all_batches(kind):
    """One graph, forward and backward; after the second batch size it serves any (of a plan: with as large tiles)."""
    torch.compiler.reset()
    model, counter = Model(kind), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows in (5, 7, 12, 4, 31):
        x = torch.randn(rows, K)
        expected = trained(model, x)
        assert len(expected) == GRADIENTS[kind]
        assert_same_bits(f"{rows} rows", trained(model, x, compiled), expected)
    assert counter.frame_count == 2, "fixed sizes, then dynamic ones"


def state_of(model: Model, r: int) -> dict[str, torch.Tensor]:
    """An adapter for the model's bank."""
    shapes = {
        name: layer.shape for name, layer in ((n, model.bank[n]) for n in model.bank.module_names)
    }
    A = {f"{name}.lora_A.weight": torch.randn(r, k) for name, (_, k) in shapes.items()}
    return A | {f"{name}.lora_B.weight": torch.randn(n, r) for name, (n, _) in shapes.items()}


@pytest.mark.parametrize("batch", ["one", "more", "fewer"])
def test_two_graphs_whatever_adapters_come_and_go(batch):
    """Of one rank; the number of adapters in the batch, and which they are, costs no compilation."""
    torch.compiler.reset()
    model, counter = Model("plan").eval(), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    bank, x = lk.AdapterBank.for_model(model.layers, num_pages=16), torch.randn(7, K)
    model.bank.evict("default")
    steps = {"one": [1] * 6, "more": [1, 2, 3, 5, 7, 7], "fewer": [7, 5, 3, 2, 1, 1]}[batch]
    model.bank = bank
    for step, count in enumerate(steps):
        names = [f"user {step}.{min(row, count - 1)}" for row in range(7)]
        for name in dict.fromkeys(names):
            bank.load(name, state_of(model, r=4))
        with torch.no_grad(), bank.using(bank.plan(names)):
            assert_same_bits(f"step {step}", compiled(x), model(x))
        for name in dict.fromkeys(names):
            bank.evict(name)
    assert counter.frame_count <= 2


def test_compiled_code_runs_under_the_plan_of_its_context():
    torch.compiler.reset()
    model, x = Model("plan").eval(), torch.randn(4, K)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    without, seen = model(x), []
    assert_same_bits("no plan", compiled(x), without)
    with model.using(x):
        planned = model(x)
        assert_same_bits("a plan", compiled(x), planned)
        thread = threading.Thread(target=lambda: seen.append(compiled(x)))
        thread.start()
        thread.join()
        copied = contextvars.copy_context()
    assert not torch.equal(planned, without)
    assert_same_bits("another thread", seen[0], without)
    assert_same_bits("no plan any more", compiled(x), without)
    with pytest.raises(RuntimeError, match="that has ended since"):
        copied.run(compiled, x)


@each_kind
def test_no_graph_break(kind):
    torch.compiler.reset()
    model, x = Model(kind), torch.randn(5, K)
    with model.using(x):
        explanation = torch._dynamo.explain(model)(x)
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)


# -- torch.export ------------------------------------------------------------------------------------


@without_plan
def test_export_saved_and_loaded(kind):
    """For any batch; the program holds the packed bytes, and nothing dense."""
    model = Model(kind).eval()
    rows = torch.export.Dim("rows", min=1, max=1024)
    program = torch.export.export(model, (torch.randn(5, K),), dynamic_shapes=({0: rows},))
    file = io.BytesIO()
    torch.export.save(program, file)
    assert (
        len(file.getvalue()) < 100_000
    )  # W alone would be 2 * 96 * 64 * 4 = 49 KB, and bytes are 6 KB
    file.seek(0)
    loaded = torch.export.load(file)
    held = [*loaded.state_dict.values(), *loaded.constants.values()]
    assert max(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor)) < K * 64
    for rows in (1, 5, 30):
        x = torch.randn(rows, K)
        assert_same_bits(kind, loaded.module()(x), model(x))


# -- autocast, checkpointing, copies -----------------------------------------------------------------


@each_kind
def test_autocast_is_that_of_linear(kind):
    model, x = Model(kind), torch.randn(5, K)
    dense = nn.Sequential(nn.Linear(K, 64), nn.Tanh(), nn.Linear(64, K, bias=False))

    def under_autocast(x):
        with torch.autocast("cpu", BF16):
            return model(x)

    y, dx, *rest = trained(model, x, under_autocast)
    with torch.autocast("cpu", BF16):
        assert y.dtype == dense(x).dtype == BF16
    assert dx.dtype == F32 and {g.dtype for g in rest} <= {F32}
    with model.using(x):
        assert_same_bits("y", y, model(x.to(BF16)))


@each_kind
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_repeats_the_dropout_mask(kind, use_reentrant):
    model, x = Model(kind, dropout=0.4), torch.randn(6, K)
    results = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        results.append(trained(model, x, run))
    assert_same_bits(kind, *results)
    torch.manual_seed(4)
    differs = not torch.equal(trained(model, x)[0], results[0][0])
    assert differs == (kind in ("lora", "plan"))


@without_plan
@pytest.mark.parametrize(
    "method", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_are_on_their_own(kind, method):
    model, x = Model(kind), torch.randn(4, K)
    before = trained(model, x)
    other = method(model)
    assert_same_bits(kind, trained(other, x), before)
    if kind == "merged":
        other.layers[0].unmerge()
        assert model.layers[0].merged
    if kind == "disabled":
        other.layers[0].enable_adapters()
    other.layers[2].absmax.zero_()
    assert not torch.equal(other(x), before[0])
    assert_same_bits("the original", trained(model, x), before)


# -- torch.func --------------------------------------------------------------------------------------


@each_kind
def test_functional_call_with_other_tensors(kind):
    model, other, x = Model(kind), Model(kind), torch.randn(4, K)
    if kind == "plan":  # which is of the model's bank; the other model has none in force
        expected = other(x)
        with model.using(x):
            assert_same_bits(kind, other(x), expected)
        return
    state = dict(other.named_parameters()) | dict(other.named_buffers())
    before = model(x)
    assert_same_bits(kind, torch.func.functional_call(model, state, (x,)), other(x))
    assert_same_bits(kind, model(x), before)


@each_kind
def test_transforms(kind):
    """vmap without gradients is a loop over the batch; what needs gradients is refused."""
    model, x = Model(kind), torch.randn(3, 4, K)
    message = r"gradients under torch.func transforms .* are not implemented for 4-bit layers"
    if kind == "plan":  # torch may say it first, since pages follow the adapter
        message += "|would mutate a captured Tensor"
    with model.using(x[0]):
        with torch.no_grad():
            expected = torch.stack([model(rows) for rows in x])
            assert_same_bits("vmap", torch.vmap(model)(x), expected)
        if GRADIENTS[kind] > 2:
            with pytest.raises(RuntimeError, match=message):
                torch.vmap(model)(x)
        with pytest.raises(RuntimeError, match=message):
            torch.func.grad(lambda x: model(x).sum())(x[0])
        with pytest.raises(RuntimeError, match=message):
            torch.func.jacrev(model)(x[0])


@each_kind
def test_double_backward_is_an_error(kind):
    model, x = Model(kind), torch.randn(4, K, requires_grad=True)
    with model.using(x):
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"once_differentiable|differentiate twice"):
            dx.square().sum().backward()


# -- nn.DataParallel ---------------------------------------------------------------------------------


def replicas(model: nn.Module, count: int, monkeypatch) -> list[nn.Module]:
    """torch's own replicate, where copying to another GPU is a differentiable copy."""

    def broadcast(tensors, devices, detach=False):
        copies = [[t.detach().clone() if detach else t.clone() for t in tensors] for _ in devices]
        return copies

    monkeypatch.setattr(replicate_module, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(replicate_module, "_get_device_index", lambda device, *_: device)
    return replicate_module.replicate(model, list(range(count)))


@without_plan
def test_replicas_work(kind, monkeypatch):
    """nn.DataParallel: each replica has its own tensors, gradients come to the model's parameters."""
    model, x = Model(kind), torch.randn(6, K)
    expected = trained(model, x)

    def run(x):
        copies = replicas(model, 2, monkeypatch)
        for copied in copies:
            assert not list(copied.parameters())
            mine, theirs = copied.layers[0].weight4bit, model.layers[0].weight4bit
            assert mine.packed.data_ptr() != theirs.packed.data_ptr()
            assert mine.absmax.data_ptr() != theirs.absmax.data_ptr()
        return torch.cat([copied(part) for copied, part in zip(copies, x.chunk(2))])

    actual = trained(model, x, run)
    assert len(actual) == len(expected) == GRADIENTS[kind]
    for a, e in zip(actual, expected):
        assert (a - e).abs().max() < 1e-5 * e.abs().max()


def test_a_plan_does_not_reach_replicas(monkeypatch):
    """They run in other threads, which see no plan, and have no pages."""
    model, x = Model("plan"), torch.randn(6, K)
    with model.using(x), pytest.raises(RuntimeError, match="replicas have no pages"):
        replicas(model, 2, monkeypatch)
    replicas(model, 2, monkeypatch)
