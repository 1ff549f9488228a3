"""``AdapterBank`` and ``Plan``: loading, evicting, plans of fixed size, and every error.

What batches compute is in test_multi_lora.py, the pool and the planner in test_page_pool.py and test_planner.py.
"""

import copy
import random

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
from banks import RANKS, Tiny, alone, expected_delta, layers, make_bank, make_model
from lowrank_kernels.multi_lora.plan import active
from tolerance import assert_same_bits

NAMES = ["a", None, "b", "a", "c", None]


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def bank(model):
    return make_bank(model)


def state_dict(model, name, prefix="base_model.model."):
    tensors = {}
    for path, layer in layers(model).items():
        A, B = layer.adapter_parameters(name)
        tensors[f"{prefix}{path}.lora_A.weight"] = A.detach().clone()
        tensors[f"{prefix}{path}.lora_B.weight"] = B.detach().clone()
    return tensors


# -- loading -----------------------------------------------------------------------------------------


def test_load_from_file_and_from_state_dict(model, bank, tmp_path):
    lk.save_adapter(model, tmp_path / "b", "b")
    fresh = lk.AdapterBank.for_model(model, num_pages=9, page_rank=16)
    fresh.load("file", tmp_path / "b")
    alpha = model.up.lora_alpha["b"]
    fresh.load("dict", state_dict(model, "b"), lora_alpha=alpha)
    fresh.load("bare", state_dict(model, "b", prefix=""), lora_alpha=alpha)
    x = torch.randn(3, 64)
    with torch.no_grad(), fresh.using(fresh.plan(["file", "dict", "bare"])):
        y = model(x)
    torch.testing.assert_close(y, alone(model, "b", x), rtol=0, atol=2e-5)
    assert fresh.free_pages == 3  # rank 20 on pages of 16


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaling_of_a_state_dict(model, bank, use_rslora):
    tensors = state_dict(model, "a")
    bank.load("alpha", tensors, lora_alpha=6, use_rslora=use_rslora)
    bank.load("none", tensors, use_rslora=use_rslora)
    scalings = bank["up"].op_args()[3]
    r = RANKS["a"]
    assert scalings[bank.slot("alpha")].item() == pytest.approx(6 / (r**0.5 if use_rslora else r))
    assert scalings[bank.slot("none")].item() == pytest.approx(1.0)


def test_adapters_that_differ_by_layer(model, bank, tmp_path):
    """Another rank in one layer (rank_pattern), or no adapter at all."""
    model.up.delete_adapter("a")
    model.up.add_adapter("a", 11, lora_alpha=5)
    nn.init.normal_(model.up.lora_B["a"].weight)
    lk.save_adapter(model, tmp_path / "a", "a")
    model.inner[1].delete_adapter("c")
    lk.save_adapter(model, tmp_path / "c", "c")
    fresh = lk.AdapterBank.for_model(model, num_pages=3)
    fresh.load("a", tmp_path / "a")
    fresh.load("c", tmp_path / "c")
    assert fresh.free_pages == 0
    x = torch.randn(4, 64)
    with torch.no_grad(), fresh.using(fresh.plan(["a", "c", "a", None])):
        y = model(x)
    for i, name in enumerate(["a", "c", "a", None]):
        torch.testing.assert_close(y[i], alone(model, name, x[i]), rtol=0, atol=2e-5)


def test_pages_of_another_dtype_hold_rounded_copies(model):
    """Of adapters from elsewhere; the model's own cannot live there."""
    rounded = lk.AdapterBank.for_model(model, num_pages=4, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"own adapter 'b' in torch.bfloat16 .*float32 in up"):
        rounded.load("b")
    assert rounded.free_pages == 4
    rounded.load("b", state_dict(model, "b"), lora_alpha=model.up.lora_alpha["b"])
    assert rounded["up"].A.dtype == torch.bfloat16
    for layer in layers(model).values():
        for p in layer.adapter_parameters("b"):
            p.data = p.data.bfloat16().float()
    x = torch.randn(3, 64)
    with torch.no_grad(), rounded.using(rounded.plan(["b"] * 3)):
        torch.testing.assert_close(model(x), alone(model, "b", x), rtol=0, atol=2e-5)


def test_the_default_dtype_is_that_of_the_adapters():
    model = Tiny()
    lk.replace_linear(model, r=2, adapter_dtype=torch.bfloat16, progress=False)
    assert lk.AdapterBank.for_model(model, 1).dtype == torch.bfloat16
    model.up.add_adapter("other", 2, adapter_dtype=torch.float16)
    assert lk.AdapterBank.for_model(model, 1).dtype == torch.float32


def test_exhaustion_leaves_everything_as_it_was(model, bank):
    free = bank.free_pages
    tensors = state_dict(model, "b")
    bank.load("b2", tensors)
    bank.load("b3", tensors)
    assert bank.free_pages == free - 6 == 1
    with pytest.raises(
        RuntimeError, match=r"'b4' of rank 20 needs 3 pages of 8 ranks, 1 of 12 are free"
    ):
        bank.load("b4", tensors)
    assert bank.free_pages == 1 and bank.adapters == ("a", "b", "c", "b2", "b3")
    bank.evict("b2")
    bank.load("b4", tensors)
    assert bank.free_pages == 1


def test_bad_adapters_are_refused_before_anything_changes(model, bank, tmp_path):
    good = state_dict(model, "a")
    key = next(iter(good))
    lacking = {k: v for k, v in good.items() if k != key}
    problems = {
        "expected it, got none": lacking,
        "expected a key": good | {"other": torch.zeros(1, 1)},
        "expected shape": good | {key: torch.zeros(5, 64)},
        "expected a LoRALinear4bit": {k.replace("up", "down"): v for k, v in good.items()},
        "float32, bfloat16 or float16": good | {key: good[key].int()},
        "expected a matrix": good | {key: good[key].flatten()},
        "expected at least one layer": {},
    }
    free, adapters = bank.free_pages, bank.adapters
    for message, tensors in problems.items():
        with pytest.raises(ValueError, match=message):
            bank.load("new", tensors)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        bank.load("new", tmp_path)
    with pytest.raises(ValueError, match="finite number"):
        bank.load("new", good, lora_alpha=float("nan"))
    assert (bank.free_pages, bank.adapters) == (free, adapters)


def test_random_loads_and_evictions_against_a_model(model):
    """Whatever came and went, each adapter that is loaded computes what it should."""
    bank = lk.AdapterBank.for_model(model, num_pages=16)
    loaded, refused = {}, 0
    for step in range(300):
        if loaded and random.random() < 0.45:
            name = random.choice(list(loaded))
            bank.evict(name)
            del loaded[name]
        else:
            r, name = random.choice((1, 3, 8, 9, 20, 40)), f"adapter {step}"
            A, B = torch.randn(r, 64), torch.randn(96, r)
            pages = -(-r // 8)
            if pages > bank.free_pages:
                with pytest.raises(RuntimeError, match="num_pages"):
                    bank.load(name, {"up.lora_A.weight": A, "up.lora_B.weight": B})
                refused += 1
            else:
                bank.load(name, {"up.lora_A.weight": A, "up.lora_B.weight": B})
                loaded[name] = A, B
        assert bank.free_pages == 16 - sum(-(-A.shape[0] // 8) for A, _ in loaded.values())
        if step % 10 == 0 and loaded:
            names = [random.choice([*loaded, None]) for _ in range(7)]
            x, y = torch.randn(7, 64), torch.zeros(7, 96)
            lk.multi_lora_(y, x, bank.plan(names), bank["up"])
            for i, name in enumerate(names):
                A, B = loaded.get(name, (torch.zeros(1, 64), torch.zeros(96, 1)))
                expected = B.double() @ (A.double() @ x[i].double())
                torch.testing.assert_close(y[i].double(), expected, rtol=1e-4, atol=1e-3)
    assert refused > 5


# -- fixed plans -------------------------------------------------------------------------------------


def test_a_fixed_plan_takes_another_batch_in_its_memory(model, bank, any_backend):
    x = torch.randn(6, 64)
    plan = bank.plan([None] * 6, fixed=True)
    tensors = [t for t in plan.op_args() if isinstance(t, torch.Tensor)]
    for names in (NAMES, ["b"] * 6, [None] * 6, ["c", "a", "b", None, "b", "b"]):
        plan.update(names)
        now = [t for t in plan.op_args() if isinstance(t, torch.Tensor)]
        assert [t.data_ptr() for t in now] == [t.data_ptr() for t in tensors]
        y = lk.multi_lora_(torch.zeros(6, 96), x, plan, bank["up"])
        expected = expected_delta(bank, "up", names, x)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_fixed_plans_refuse_what_does_not_fit(model, bank):
    plan = bank.plan(["a", "c"], fixed=True)
    assert plan.max_rank == RANKS["b"]  # the largest that is loaded
    bank.load(
        "large", {"up.lora_A.weight": torch.zeros(30, 64), "up.lora_B.weight": torch.zeros(96, 30)}
    )
    with pytest.raises(ValueError, match="max_rank = 20, got 30"):
        plan.update(["large", "a"])
    with pytest.raises(ValueError, match="expected 2 rows in all, got 3"):
        plan.update(["a", "a", "b"])
    with pytest.raises(ValueError, match="fixed=True"):
        bank.plan(["a"]).update(["b"])
    with pytest.raises(ValueError, match="max_rank: expected an integer >= 30"):
        bank.plan(["a"], fixed=True, max_rank=8)
    with bank.using(plan), pytest.raises(RuntimeError, match="in use"):
        plan.update(["b", "c"])
    assert plan.names == ("a", "c")


# -- errors ------------------------------------------------------------------------------------------


def test_errors_of_the_bank(model, bank):
    for_model = lk.AdapterBank.for_model
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module"):
        for_model({}, 4)
    with pytest.raises(ValueError, match="model: expected all LoRALinear4bit"):
        for_model(nn.Linear(2, 2), 4)
    for pages in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="num_pages: expected an integer >= 1"):
            for_model(model, pages)
    for page_rank in (0, 4, 12, "8"):
        with pytest.raises(ValueError, match="page_rank: expected a multiple of 8"):
            for_model(model, 4, page_rank)
    with pytest.raises(TypeError, match="dtype: expected float32"):
        for_model(model, 4, dtype=torch.int8)
    with pytest.raises(KeyError, match="expected one of this bank's 2 modules"):
        bank["down"]
    for name in ("", None, 3):
        with pytest.raises(ValueError, match="name: expected a non-empty string"):
            bank.load(name)
    with pytest.raises(ValueError, match="'a', which is loaded"):
        bank.load("a")
    with pytest.raises(ValueError, match="name: expected one of the model's own adapters"):
        bank.load("z")
    with pytest.raises(ValueError, match="name: expected one of"):
        bank.evict("z")
    bank.load("copy", state_dict(model, "a"))
    with pytest.raises(ValueError, match="names: expected the model's own adapters"):
        bank.trainable("copy")


def test_errors_of_plans(model, bank):
    with pytest.raises(ValueError, match=r"names: expected loaded adapters.*got 'z'"):
        bank.plan(["a", "z"])
    with pytest.raises(ValueError, match=r"names: expected loaded adapters.*got 7"):
        bank.plan([7])
    with pytest.raises(ValueError, match="one number per name, 2, got 1"):
        bank.plan(["a", "b"], [3])
    with pytest.raises(ValueError, match="tokens"):
        bank.plan(["a", "b"], [3, -1])
    with pytest.raises(TypeError, match="tokens"):
        bank.plan(["a"], [1.5])


def test_errors_of_the_forward(model, bank):
    other_model, x = copy.deepcopy(model), torch.randn(4, 64)
    other = other_model(x)
    plan = bank.plan(["a", "b"], [2, 2])
    with bank.using(plan):
        with pytest.raises(ValueError, match=r"expected 4 rows.*or shape \[2, 1, K\].*got 3 rows"):
            model(x[:3])
        assert_same_bits("another model", other_model(x), other)
    other = lk.AdapterBank.for_model(other_model, 12)
    other.load("a")
    with pytest.raises(ValueError, match="got one of another AdapterBank"), other.using(plan):
        pass
    with pytest.raises(TypeError, match="expected a Plan"), bank.using("a"):
        pass
    y = torch.zeros(4, 96)
    with pytest.raises(ValueError, match="pages: expected those of the plan's bank"):
        lk.multi_lora_(y, x, plan, other["up"])
    with pytest.raises(ValueError, match="y: expected shape"):
        lk.multi_lora_(y[:, :5], x, plan, bank["up"])
    with pytest.raises(ValueError, match="x: expected shape"):
        lk.multi_lora_(y, x, plan, bank["inner.1"])
    with pytest.raises(TypeError, match=r"y: expected torch.float32 like x"):
        lk.multi_lora_(y.half(), x, plan, bank["up"])
    with pytest.raises(TypeError, match="pages: expected bank"):
        lk.multi_lora_(y, x, plan, "up")
    with pytest.raises(TypeError, match="plan: expected a Plan"):
        lk.multi_lora_(y, x, None, bank["up"])
    with pytest.raises(ValueError, match="y: expected rows that can be seen as one matrix"):
        lk.multi_lora_(torch.zeros(2, 2, 96).transpose(0, 1), x.view(2, 2, 64), plan, bank["up"])
    model.up.set_adapter("a")
    model.up.merge()
    with bank.using(plan), pytest.raises(RuntimeError, match="is merged; call unmerge"):
        model(x)


def test_adapters_in_use_cannot_be_evicted(model, bank):
    plan = bank.plan(["a", None])
    with bank.using(plan):
        with pytest.raises(RuntimeError, match="'a' is in a plan in use"):
            bank.evict("a")
        bank.evict("b")
        model(torch.randn(2, 64))
    bank.evict("a")
    for use in (lambda: bank.using(plan).__enter__(), lambda: plan.check_current()):
        with pytest.raises(RuntimeError, match="has been evicted since the plan was made"):
            use()
    bank.load("a")  # into the same slot: the plan is still of the one before
    with pytest.raises(RuntimeError, match="evicted"):
        lk.multi_lora_(torch.zeros(2, 96), torch.randn(2, 64), plan, bank["up"])


def test_plans_nest_and_end_with_their_block(model, bank):
    outer, inner = bank.plan(["a"]), bank.plan(["b"])
    with bank.using(outer):
        with pytest.raises(ZeroDivisionError), bank.using(inner):
            assert active() is inner
            raise ZeroDivisionError
        assert active() is outer
    assert active() is None
    bank.evict("a")
    bank.evict("b")


def test_an_adapter_that_changed_its_rank_is_noticed(model, bank):
    model.up.delete_adapter("a")
    model.up.add_adapter("a", 9)
    with pytest.raises(RuntimeError, match="up: expected its adapter 'a' with r = 4"):
        with bank.using(bank.plan(["a"])):
            pass
    assert active() is None
