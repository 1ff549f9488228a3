"""Batches with many adapters as a user makes them: ``multi_lora_``, and models under a plan.

The operators' numbers are in test_multi_lora_*.py, banks and plans in test_bank.py.
"""

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
import tolerance
from banks import alone, expected_delta, layers, make_bank, make_model
from lowrank_kernels.multi_lora.functional import multi_lora_linear_4bit


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def bank(model):
    return make_bank(model)


# -- a batch -----------------------------------------------------------------------------------------

NAMES = ["a", None, "b", "a", "c", None]


def test_each_row_is_as_if_alone(model, bank, any_backend):
    x = torch.randn(6, 3, 64)
    with torch.no_grad(), bank.using(bank.plan(NAMES, [3] * 6)):
        y = model(x)
    for i, name in enumerate(NAMES):
        torch.testing.assert_close(y[i], alone(model, name, x[i]), rtol=0, atol=2e-5)


def test_rows_without_adapter_are_the_base_bit_for_bit(model, bank, backend):
    x = torch.randn(20, 64)
    layer = model.up
    with torch.no_grad(), bank.using(bank.plan(["a", None, "b"], [6, 8, 6])):
        y = layer(x)
    layer.disable_adapters()
    with torch.no_grad():
        if (
            backend == "emulator"
        ):  # the sum with nothing is the same sum; its order may differ by family
            torch.testing.assert_close(y[6:14], layer(x)[6:14], rtol=0, atol=1e-5)
        else:
            tolerance.assert_same_bits("base", y[6:14], layer(x)[6:14])


def test_sequences_of_any_length_and_none(model, bank):
    x = torch.randn(9, 64)
    plan = bank.plan(["b", "a", None, "c"], tokens_per_sequence=[5, 0, 3, 1])
    with torch.no_grad(), bank.using(plan):
        y = model(x)
    expected = [(slice(0, 5), "b"), (slice(5, 8), None), (slice(8, 9), "c")]
    for rows, name in expected:
        torch.testing.assert_close(y[rows], alone(model, name, x[rows]), rtol=0, atol=2e-5)
    assert (plan.tokens, plan.names) == (9, ("b", "a", None, "c"))


@pytest.mark.parametrize("names", [[], [None, None], [None]])
def test_batches_without_adapters(model, bank, names):
    x = torch.randn(len(names), 64)
    with torch.no_grad(), bank.using(bank.plan(names)):
        y = model(x)
    torch.testing.assert_close(y, alone(model, None, x), rtol=0, atol=1e-5)
    pages = bank["up"]
    before = torch.randn(len(names), 96)
    assert torch.equal(lk.multi_lora_(before.clone(), x, bank.plan(names), pages), before)


def test_decode_steps_follow_the_prefill(model, bank):
    """One row per sequence under a plan of more tokens: the same adapters."""
    x = torch.randn(3, 1, 64)
    with torch.no_grad():
        with bank.using(bank.plan(["a", None, "b"], [4, 2, 7])):
            y = model(x)
        with bank.using(bank.plan(["a", None, "b"])):
            expected = model(x)
    tolerance.assert_same_bits("decode step", y, expected)


def test_disabled_layers_are_the_base(model, bank):
    x = torch.randn(2, 64)
    model.up.disable_adapters()
    with torch.no_grad(), bank.using(bank.plan(["a", "b"])):
        y = model.up(x)
        model.up.enable_adapters()
        assert not torch.equal(model.up(x), y)
    tolerance.assert_same_bits("base", y, lk.linear_4bit(x, model.up.weight4bit, model.up.bias))


def test_autocast(model, bank):
    x = torch.randn(4, 64)
    plan = bank.plan(["a", "b", None, "c"])
    with torch.no_grad(), bank.using(plan), torch.autocast("cpu", torch.bfloat16):
        y = model.up(x)
    assert y.dtype == torch.bfloat16
    with torch.no_grad(), bank.using(plan):
        tolerance.assert_same_bits("autocast", y, model.up(x.bfloat16()))


def test_compiles_without_graph_breaks(model, bank):
    x = torch.randn(4, 64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for names in (["a", "b", None, "c"], ["c", None, "a", "a"]):
            with bank.using(bank.plan(names)):
                tolerance.assert_same_bits(f"compiled, {names}", compiled(x), model(x))


# -- multi_lora_ -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_multi_lora_adds_in_place(bank, dtype):
    x, y = torch.randn(6, 64).to(dtype), torch.randn(6, 96).to(dtype)
    before = y.clone()
    out = lk.multi_lora_(y, x, bank.plan(NAMES), bank["up"])
    assert out is y
    expected = before.double() + expected_delta(bank, "up", NAMES, x)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance.U_OUT[dtype], atol=1e-5)
    assert torch.equal(y[1], before[1]) and torch.equal(y[5], before[5])


def test_multi_lora_takes_leading_dimensions_and_views(bank):
    x, wide = torch.randn(2, 3, 64), torch.randn(2, 3, 100)
    before = wide.clone()
    y = wide[..., 2:98]
    lk.multi_lora_(y, x, bank.plan(["a", "b"], [3, 3]), bank["up"])
    names = ["a"] * 3 + ["b"] * 3
    delta = expected_delta(bank, "up", names, x.flatten(0, 1)).view(2, 3, 96)
    torch.testing.assert_close(y.double(), before[..., 2:98].double() + delta, rtol=0, atol=1e-5)
    assert torch.equal(wide[..., :2], before[..., :2])
    assert torch.equal(wide[..., 98:], before[..., 98:])


def test_gradients_of_multi_lora(bank):
    bank.trainable("a", "b")
    x = torch.randn(6, 64, requires_grad=True)
    y0 = torch.randn(6, 96, requires_grad=True)
    dy = torch.randn(6, 96)
    layer = bank["up"].owner.layer
    leaves = [x, y0, *layer.adapter_parameters("a"), *layer.adapter_parameters("b")]
    y = lk.multi_lora_(y0.clone(), x, bank.plan(NAMES), bank["up"])
    actual = torch.autograd.grad(y, leaves, dy)
    rows = []
    for i, name in enumerate(NAMES):
        delta = 0.0
        if name is not None:
            A, B = layer.adapter_parameters(name)
            delta = layer.scaling[name] * (x[i] @ A.T @ B.T)
        rows.append(y0[i] + delta)
    expected = torch.autograd.grad(torch.stack(rows), leaves, dy)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_what_needs_no_gradient_gets_none(model, bank):
    bank.trainable("b")
    with bank.using(bank.plan(["a", "b"])):
        model(torch.randn(2, 64)).sum().backward()
    for layer in layers(model).values():
        assert all(p.grad is None for p in layer.adapter_parameters("a"))
        assert all(p.grad.abs().sum() > 0 for p in layer.adapter_parameters("b"))


# -- training together -------------------------------------------------------------------------------


def gradients(model, names):
    return {
        (path, name, i): p.grad.clone()
        for path, layer in layers(model).items()
        for name in names
        for i, p in enumerate(layer.adapter_parameters(name))
    }


def test_two_adapters_together_get_the_gradients_of_each_alone(model, bank, any_backend):
    model.train()
    x = torch.randn(7, 5, 64)
    names = ["a", "b", "b", None, "a", "c", "b"]
    bank.trainable("a", "b")
    with bank.using(bank.plan(names, [5] * 7)):
        model(x).square().sum().backward()
    together = gradients(model, "ab")
    for name in "ab":
        model.zero_grad()
        rows = [i for i, n in enumerate(names) if n == name]
        alone(model, name, x[rows]).square().sum().backward()
        for key, expected in gradients(model, name).items():
            scale = expected.abs().max().item()
            torch.testing.assert_close(together[key], expected, rtol=0, atol=3e-5 * scale)


def test_an_optimizer_trains_both(model, bank):
    model.train()
    optimizer = torch.optim.AdamW(bank.trainable("a", "b"), lr=0.02)
    x = torch.randn(4, 64)
    target = torch.randn(4, 10)
    frozen = [p.clone() for p in model.up.adapter_parameters("c")]
    losses = []
    with bank.using(bank.plan(["a", "b", "a", "b"])):
        for _ in range(30):
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for before, after in zip(frozen, model.up.adapter_parameters("c")):
        assert torch.equal(before, after)
    with (
        torch.no_grad(),
        bank.using(bank.plan(["a", "b", "a", "b"])),
    ):  # the pages have the last step
        y = model(x)
    torch.testing.assert_close(y[::2], alone(model, "a", x[::2]), rtol=0, atol=2e-5)
    torch.testing.assert_close(y[1::2], alone(model, "b", x[1::2]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("chances", [(0.5, 0.0, 0.25), (0.0, 0.5, 0.0)])
def test_each_adapter_has_its_own_dropout(model, bank, chances):
    """The mask is that of the reference, for the probability of the row's adapter; none in evaluation."""
    x, w = torch.randn(40, 64), model.up.weight4bit
    for name, p in zip("abc", chances):
        model.up.lora_dropout[name] = p
        bank.evict(name)
        bank.load(name)
    names = ["a", "b", "c", None] * 10
    plan, pages = bank.plan(names), bank["up"]
    torch.manual_seed(5)
    y = multi_lora_linear_4bit(x, w, plan, pages, dropout=True)
    torch.manual_seed(5)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    args = (x, *w.op_args(), *plan.op_args(), *pages.op_args(), seed, None)
    tolerance.check("multi_lora_linear_4bit", args, lk.schema.ops.multi_lora_linear_4bit(*args))
    tolerance.assert_same_bits("seeded", y, lk.schema.ops.multi_lora_linear_4bit(*args)[0])
    without = multi_lora_linear_4bit(x, w, plan, pages)
    same = (y == without).all(1)
    for i, p in enumerate((*chances, 0.0)):
        assert same[i::4].all() if p == 0.0 else not same[i::4].any()


def test_a_step_between_forward_and_backward_is_an_error(model, bank):
    parameters = bank.trainable("a")
    with bank.using(bank.plan(["a", "a"])):
        loss = model(torch.randn(2, 64)).sum()
        with torch.no_grad():
            for p in parameters:
                p.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_backward_after_eviction_is_an_error(model, bank):
    bank.trainable("a")
    with bank.using(bank.plan(["a", "a"])):
        loss = model(torch.randn(2, 64)).sum()
    bank.evict("a")
    with pytest.raises(RuntimeError, match="evicted"):
        loss.backward()


def test_checkpointing_inside_the_block(model, bank):
    bank.trainable("a", "b")
    model.train()
    x = torch.randn(4, 64, requires_grad=True)
    plan = bank.plan(["a", "b", None, "a"])
    results = []
    for checkpointed in (False, True):
        model.zero_grad()
        with bank.using(plan):
            y = (
                torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
                if checkpointed
                else model(x)
            )
            y.square().sum().backward()
        results.append(gradients(model, "ab"))
    for key, expected in results[0].items():
        tolerance.assert_same_bits(str(key), results[1][key], expected)


# -- a real architecture -----------------------------------------------------------------------------


def test_generation_with_a_cache():
    """transformers' generate under one plan: each row's tokens are those of its adapter alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    lk.replace_linear(model, r=4, lora_alpha=8, adapter_name="a", progress=False)
    for layer in layers(model).values():
        layer.add_adapter("b", 12, lora_alpha=24)
        for name in "ab":
            nn.init.normal_(layer.lora_B[name].weight, std=0.3)
    bank = lk.AdapterBank.for_model(model, num_pages=8)
    bank.load("a")
    bank.load("b")
    ids = torch.randint(1, 64, (4, 7))
    names = ["a", None, "b", "a"]
    settings = {"max_new_tokens": 12, "do_sample": False, "use_cache": True}
    with bank.using(bank.plan(names, [7] * 4)):
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    texts = []
    for name in ("a", "b", None):
        for layer in layers(model).values():
            layer.disable_adapters() if name is None else layer.set_adapter(name)
        # As many rows, so that the same kernels run and no token hangs on the last bit.
        texts.append(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings))
        for layer in layers(model).values():
            layer.enable_adapters()
    for i, name in enumerate(names):
        assert torch.equal(out[i], texts[("a", "b", None).index(name)][i])
    assert not torch.equal(texts[0], texts[1])
