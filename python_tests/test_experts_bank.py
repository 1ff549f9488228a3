"""Many adapters in one batch on experts in 4 bits: serving, training, generation."""

import copy

import pytest
import torch

import lowrank_kernels as lk
from tiny_experts import BOTH, TOKENS, adapted, dense, logits, randomize

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
NAMES = ["qwen3_moe", "gpt_oss"]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("page_rank", [8, 16])
def test_many_adapters_on_many_experts(name, page_rank, tmp_path):
    alone = {}
    for i, (r, parameters) in enumerate(((4, BOTH), (12, BOTH), (3, BOTH[1:]))):
        alone[f"a{i}"] = adapted(name, parameters, r, seed=i)
        lk.save_adapter(alone[f"a{i}"], tmp_path / f"a{i}")
    base = dense(name)
    lk.replace_linear(base, r=4, progress=False)
    bank = lk.AdapterBank.for_model(base, 16, page_rank, target_parameters=BOTH)
    for adapter in alone:
        bank.load(adapter, tmp_path / adapter)
    tokens = torch.randint(0, 96, (6, 7))
    names = ["a0", None, "a1", "a2", "a0", "a1"]
    plan = bank.plan(names, [7] * 6)
    with torch.no_grad(), bank.using(plan):
        y = logits(base, tokens)
        assert torch.equal(logits(base, tokens), y)
    with lk.disable_adapters(base):
        plain = logits(base, tokens)
    for i, adapter in enumerate(names):
        one = tokens[i : i + 1]
        expected = plain[i] if adapter is None else logits(alone[adapter], one)[0]
        torch.testing.assert_close(y[i], expected, **CLOSE)


def test_gradients_of_x_pass_the_bank(tmp_path):
    model = adapted("qwen3_moe", BOTH)
    lk.save_adapter(model, tmp_path)
    base = dense("qwen3_moe")
    lk.replace_linear(base, r=4, progress=False)
    bank = lk.AdapterBank.for_model(base, 8, target_parameters=BOTH)
    bank.load("a", tmp_path)
    gradients = []
    for each in (model, base):
        x = base.get_input_embeddings()(TOKENS).detach().requires_grad_()
        if each is base:
            with bank.using(bank.plan(["a", "a"], [9, 9])):
                each(inputs_embeds=x, use_cache=False).logits.square().mean().backward()
        else:
            each(inputs_embeds=x, use_cache=False).logits.square().mean().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def with_own_adapters(name, ranks):
    """A model in 4 bits with adapters a0, a1, ... of these ranks, and a bank that has them all."""
    model = adapted(name, BOTH, ranks[0], "a0")
    for i, r in enumerate(ranks[1:], 1):
        lk.add_adapter(model, f"a{i}", r, 8, target_parameters=BOTH)
    randomize(model)
    bank = lk.AdapterBank.for_model(model, 16, target_parameters=BOTH)
    for i in range(len(ranks)):
        bank.load(f"a{i}")
    return model, bank


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [(4, 12), (9, 3, 8)])
def test_the_models_own_adapters_train_together_as_alone(name, ranks):
    model, bank = with_own_adapters(name, ranks)
    names = [f"a{i}" for i in range(len(ranks))]
    alone = copy.deepcopy(model)
    tokens = torch.randint(0, 96, (len(ranks), 7))
    optimizers = []
    for each in (model, alone):
        parameters = [p for n, p in each.named_parameters() if "lora_" in n]
        optimizers.append(torch.optim.SGD(parameters, lr=0.5))
    for _ in range(3):
        with bank.using(bank.plan(names, [7] * len(ranks))):
            bank.trainable(*names)
            model(input_ids=tokens, use_cache=False).logits.square().sum().backward()
        for i, adapter in enumerate(names):
            lk.set_adapter(alone, adapter)
            one = tokens[i : i + 1]
            alone(input_ids=one, use_cache=False).logits.square().sum().backward()
        together, apart = (
            {n: p.grad for n, p in each.named_parameters() if "lora_" in n}
            for each in (model, alone)
        )
        for key, gradient in together.items():
            torch.testing.assert_close(gradient, apart[key], rtol=2e-3, atol=1e-4, msg=key)
        for optimizer in optimizers:
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.5)
            optimizer.step()
            optimizer.zero_grad()
    state, expected = model.state_dict(), alone.state_dict()
    for key in (key for key in expected if "experts" in key and "lora_" in key):
        torch.testing.assert_close(state[key], expected[key], rtol=1e-3, atol=1e-4)


def test_some_of_a_batchs_adapters_train():
    model, bank = with_own_adapters("qwen3_moe", (4, 12))
    bank.trainable("a1")
    with bank.using(bank.plan(["a0", "a1"], [7, 7])):
        logits(model, torch.randint(0, 96, (2, 7))).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if "experts" in n and "lora_" in n}
    assert all((g is not None) == (".a1." in n) for n, g in gradients.items())
    assert any(g.any() for n, g in gradients.items() if ".a1." in n)


def test_checkpointing_under_a_bank():
    model, bank = with_own_adapters("qwen3_moe", (4, 12))
    bank.trainable("a0", "a1")
    gradients = []
    for each in (False, True):
        if each:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with bank.using(bank.plan(["a0", "a1"], [9, 9])):
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        own = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
        gradients.append([p.grad for p in own])
        for p in own:
            p.grad = None
    assert gradients[0] and len(gradients[0]) == len(gradients[1])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_what_changes_a_banks_copies():
    model, bank = with_own_adapters("qwen3_moe", (4,))
    plan = bank.plan(["a0", "a0"], [9, 9])
    lora_B = model.model.layers[1].mlp.experts.down_proj.lora_B["a0"].weight
    with bank.using(plan):
        before = logits(model)
        with torch.no_grad():
            lora_B.mul_(2)
        after = logits(model)
    torch.testing.assert_close(after, logits(model), **CLOSE)
    assert not torch.allclose(before, after, atol=1e-3)
    lora_B.data.mul_(0.5)  # leaves no trace but in the values
    with bank.using(plan):
        torch.testing.assert_close(logits(model), before, **CLOSE)
        y = logits(model)
        with torch.no_grad():
            lora_B.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    bank.evict("a0")
    torch.testing.assert_close(logits(model), after, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_generate_under_one_plan(name):
    model, bank = with_own_adapters(name, (4, 12))
    tokens = torch.randint(0, 96, (3, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"attention_mask": torch.ones_like(tokens)}
    names = ["a1", None, "a0"]
    with bank.using(bank.plan(names, [5, 5, 5])):
        together = model.generate(tokens, **options)
    options["attention_mask"] = options["attention_mask"][:1]
    for i, adapter in enumerate(names):
        with lk.disable_adapters(model) if adapter is None else lk.set_adapter(model, adapter):
            alone = model.generate(tokens[i : i + 1], **options)
        assert together[i].tolist() == alone[0].tolist()


def test_the_innermost_plan_counts():
    model, bank = with_own_adapters("qwen3_moe", (4, 12))
    one = TOKENS[:1]
    with bank.using(bank.plan(["a1", "a0"], [9, 9])), bank.using(bank.plan(["a0"], [9])):
        y = logits(model, one)
    torch.testing.assert_close(y, logits(model, one), **CLOSE)


def test_what_a_bank_refuses(tmp_path):
    model = adapted("qwen3_moe", BOTH)
    bank = lk.AdapterBank.for_model(model, 8, target_parameters=BOTH)
    lk.save_adapter(model, tmp_path)
    bank.load("a", tmp_path)
    with bank.using(bank.plan(["a"], [5])), pytest.raises(ValueError, match="expected 5 rows"):
        logits(model, TOKENS[:1])
    experts, chosen = model.model.layers[0].mlp.experts, torch.tensor([[0, 1], [1, 2]])
    with bank.using(bank.plan(["a", "a"], [5, 5])), pytest.raises(ValueError, match="10 rows"):
        experts(torch.randn(2, 64), chosen, torch.ones(2, 2))  # any two tokens
    with pytest.raises(ValueError, match=r"target_parameters: .*matches no stack"):
        lk.AdapterBank.for_model(model, 8, target_parameters=["experts.up_proj"])
    plain = lk.AdapterBank.for_model(model, 8)
    with pytest.raises(ValueError, match="experts"):
        plain.load("a", tmp_path)
