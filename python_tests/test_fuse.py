"""``replace_linear(fuse=True)``: layers that read one x compute in one operator, and nothing else changes."""

import copy
import gc
import io
import threading
import warnings
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lk
from lowrank_kernels import shared_input

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3Text", "Phi"]


def dense(family="Llama"):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES)
    name = {"Gemma3Text": "Gemma3"}.get(family, family)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def replaced(model, fuse, **more):
    torch.manual_seed(1)
    report = lk.replace_linear(model, r=4, progress=False, fuse=fuse, **more)
    for layer in model.modules():
        if isinstance(layer, lk.LoRALinear4bit):
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return model, report


@pytest.fixture
def pair():
    """(a model, the same fused)."""
    model = dense()
    return replaced(copy.deepcopy(model), False)[0], replaced(model, True)[0]


IDS = torch.tensor([[5, 9, 31, 2, 77, 40], [3, 8, 1, 60, 22, 11]])


class Operators(TorchDispatchMode):
    """Names of our operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "lowrank_kernels" in str(function):
            self.names.append(str(function).split(".")[1])
        return function(*args, **(kwargs or {}))


def operators(call) -> list[str]:
    with Operators() as mode:
        call()
    assert shared_input.opened.scopes == ()
    return mode.names


def logits(model, **more):
    return model(IDS, **more).logits


def gradients(model, **more):
    model.zero_grad()
    torch.manual_seed(2)
    model(IDS, labels=IDS, **more).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(plain, fused):
    """The same logits, bit by bit, and gradients that differ by dx's order of sums alone."""
    torch.manual_seed(2)
    expected = logits(plain)
    torch.manual_seed(2)
    assert torch.equal(logits(fused), expected)
    wanted, found = gradients(plain), gradients(fused)
    assert wanted.keys() == found.keys() and wanted
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model = dense(family)
    plain, _ = replaced(copy.deepcopy(model), False)
    fused, report = replaced(model, True)
    groups = 1 if family == "Phi" else 2
    assert len(report.fused) == groups * SIZES["num_hidden_layers"]
    assert "fused: " in str(report)
    assert_same_step(plain, fused)
    alone, together = operators(lambda: logits(plain)), operators(lambda: logits(fused))
    joined = [name for name in together if name.endswith("group")]
    assert len(joined) == groups * SIZES["num_hidden_layers"]
    assert len(together) == len(alone) - (3 if groups == 2 else 2) * SIZES["num_hidden_layers"]


def test_keys_adapters_and_copies(pair, tmp_path):
    plain, fused = pair
    assert list(plain.state_dict()) == list(fused.state_dict())
    lk.save_adapter(fused, tmp_path)
    lk.load_adapter(plain, tmp_path, name="again")
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for model in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
        assert torch.equal(logits(model), logits(plain))
        assert any("group" in name for name in operators(lambda model=model: logits(model)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(pair, mode):
    plain, fused = pair
    with mode():
        assert torch.equal(logits(fused), logits(plain))
        assert sum("group" in name for name in operators(lambda: logits(fused))) == 4


def test_dropout_draws_as_separate_layers_do():
    model = dense()
    plain, _ = replaced(copy.deepcopy(model), False, lora_dropout=0.5)
    fused, _ = replaced(model, True, lora_dropout=0.5)
    assert_same_step(plain.train(), fused.train())


def test_checkpointed_layers(pair):
    plain, fused = pair
    for model in pair:
        model.gradient_checkpointing_enable()
        model.train()
    assert_same_step(plain, fused)


def test_under_a_plan(pair):
    found = []
    for model in pair:
        bank = lk.AdapterBank.for_model(model, num_pages=8)
        bank.load("default")
        with bank.using(bank.plan(["default", None], [IDS.shape[1]] * 2)):
            names = operators(lambda model=model: found.append(logits(model)))
    assert torch.equal(*found)
    assert sum(name == "multi_lora_linear_4bit_group" for name in names) == 4


def test_disabled_and_partly_merged(pair):
    for change in (
        lambda layer: layer.disable_adapters(),
        lambda layer: layer.enable_adapters(),
        lambda layer: layer.merge(),
        lambda layer: layer.unmerge(),
        lambda layer: layer.delete_adapter("default"),
    ):
        for model in pair:
            change(model.model.layers[0].self_attn.k_proj)
        assert torch.equal(logits(pair[1]), logits(pair[0]))


def test_a_hook_that_changes_a_member_between_the_calls(pair):
    """What was computed for the others before is not taken then."""
    for model in pair:
        attention = model.model.layers[0].self_attn
        attention.k_proj.register_forward_pre_hook(
            lambda layer, args: layer.disable_adapters() and None
        )
        attention.v_proj.register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
    assert torch.equal(logits(pair[1]), logits(pair[0]))


def test_x_that_is_written_to_between_the_calls(pair):
    for model in pair:
        model.model.layers[0].mlp.up_proj.register_forward_pre_hook(
            lambda layer, args: (args[0].mul_(2),)
        )
    for mode in (
        torch.no_grad,
        torch.inference_mode,
    ):  # where tensors count their versions, and where not
        with mode():
            assert torch.equal(logits(pair[1]), logits(pair[0]))


def test_an_error_leaves_nothing_behind(pair):
    _, fused = pair
    attention = fused.model.layers[0].self_attn
    handle = attention.v_proj.register_forward_pre_hook(lambda layer, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(fused)
    assert shared_input.opened.scopes == ()
    handle.remove()
    x = torch.randn(2, 64)
    attention.q_proj(x)
    kept = weakref.ref(x)
    del x
    gc.collect()
    assert kept() is None


def test_no_input_outlives_the_forward(pair):
    _, fused = pair
    seen = []
    for layer in fused.model.layers:
        layer.mlp.gate_proj.register_forward_pre_hook(
            lambda _, args: seen.append(weakref.ref(args[0]))
        )
    with torch.no_grad():
        logits(fused)
    gc.collect()
    assert seen and not any(reference() is not None for reference in seen)


def test_members_called_with_other_tensors_or_twice(pair):
    plain, fused = (model.model.layers[0].mlp for model in pair)
    x, other = torch.randn(3, 64), torch.randn(3, 64)

    def forward(mlp):
        def call(rows):
            return mlp.gate_proj(rows), mlp.up_proj(other), mlp.up_proj(rows), mlp.up_proj(rows)

        return call

    for mlp in (plain, fused):
        mlp.forward = forward(mlp)
    for found, expected in zip(fused(x), plain(x), strict=True):
        assert torch.equal(found, expected)


def test_compiled_as_without(pair):
    plain, fused = pair
    compiled = torch.compile(fused.model.layers[0].mlp, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64)
    torch.testing.assert_close(compiled(x), plain.model.layers[0].mlp(x))


def test_under_peft():
    model = dense()
    lk.replace_linear(model, r=0, progress=False, fuse=True)
    plain = copy.deepcopy(dense())
    lk.replace_linear(plain, r=0, progress=False)
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.25
    )
    both = []
    for of in (plain, model):
        torch.manual_seed(3)
        both.append(peft.get_peft_model(of, config).train())
    assert_same_step(*both)
    names = operators(lambda: logits(both[1]))
    assert names.count("lora_linear_4bit_group") == 4
    with both[0].disable_adapter(), both[1].disable_adapter():
        assert torch.equal(logits(both[1]), logits(both[0]))


def test_autocast(pair):
    plain, fused = pair
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(fused), logits(plain))


def test_two_threads_do_not_see_each_other(pair):
    plain, fused = pair
    with torch.no_grad():
        expected, found = logits(plain), [None] * 2

    def run(i):
        with torch.no_grad():
            found[i] = logits(fused)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(torch.equal(y, expected) for y in found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_of_the_parent(pair, reentrant):
    for model in pair:
        mlp = model.model.layers[0].mlp
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        checkpoint(mlp, x, use_reentrant=reentrant).sum().backward()
        mlp.dx = x.grad
    torch.testing.assert_close(pair[1].model.layers[0].mlp.dx, pair[0].model.layers[0].mlp.dx)
    assert shared_input.opened.scopes == ()


def test_a_model_that_is_not_known_says_so():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32))
    with pytest.warns(
        UserWarning, match="fuse: nothing was fused in this model: none of its modules"
    ):
        report = lk.replace_linear(model, r=4, progress=False, fuse=True)
    assert report.fused == [] and "fused" not in str(report)
    phi = transformers.Phi3ForCausalLM(transformers.Phi3Config(**SIZES, rope_parameters=None))
    with pytest.warns(UserWarning, match="joined in one layer already"):
        lk.replace_linear(phi, r=4, progress=False, fuse=True)


def test_the_argument():
    with pytest.raises(TypeError, match="fuse: expected True or False, got 1"):
        lk.replace_linear(dense(), r=4, progress=False, fuse=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, report = replaced(dense(), False)
    assert report.fused == []
