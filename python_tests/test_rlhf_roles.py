"""RoleModel: one mixed forward is what each role computes alone, bits are kept, files are PEFT's."""

import pytest
import torch
import transformers

import lowrank_kernels as lk
from lowrank_kernels import rlhf
from rlhf_models import VOCABULARY, batch, causal, classifier, reward_folder, sft_folder

peft = pytest.importorskip("peft")
ALL = ["policy", "reference", "value", "reward"]


def randomize(roles, seed=7):
    """As after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in roles.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return roles


@pytest.fixture
def roles(tmp_path):
    sft_folder(tmp_path / "sft")
    reward_folder(tmp_path / "rm")
    made = rlhf.RoleModel(causal(), r=8, reference=tmp_path / "sft", reward=tmp_path / "rm")
    return randomize(made)


def logprobs_of(model, ids, mask):
    """Of every token after the first, by the model itself in full."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.double()
    logp = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return logp.where((mask[:, 1:] & mask[:, :-1]).bool(), 0)


@pytest.mark.parametrize("left", [False, True], ids=["padding right", "padding left"])
def test_one_forward_is_what_each_role_computes_alone(roles, tmp_path, left):
    ids, mask = batch(left=left)
    out = roles.score(ids, mask, ALL)
    with torch.no_grad():
        policy = logprobs_of(roles.model, ids, mask)
        lk.load_adapter(roles.model, tmp_path / "sft", "again")
        reference = logprobs_of(roles.model, ids, mask)
        lk.set_adapter(roles.model, "value")
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        hidden = roles.model.model(ids, attention_mask=mask, position_ids=positions)
        value = hidden.last_hidden_state @ roles.value_head.weight[0]
    keep = mask.bool()
    torch.testing.assert_close(out["policy"].double(), policy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["reference"].double(), reference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["value"][keep], value[keep], rtol=1e-4, atol=1e-4)


def test_absolute_positions_are_counted_from_the_first_token():
    """Of padding on either side; rotary positions do not show it."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, dropout=0.0,
        attention_dropout=0.0, word_embed_proj_dim=64, max_position_embeddings=64, init_std=0.5,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).eval()
    lk.replace_linear(model, r=0, progress=False)
    roles = rlhf.RoleModel(model, r=8)
    ids, mask = batch(left=True)
    out = roles.score(ids, mask, ["policy"])["policy"]
    for row in range(len(ids)):
        own = ids[row][mask[row].bool()][None]
        alone = roles.score(own, torch.ones_like(own), ["policy"])["policy"][0]
        torch.testing.assert_close(out[row, -len(alone) :], alone, rtol=1e-4, atol=1e-4)


def test_the_reward_is_what_the_file_scores_in_peft(roles, tmp_path):
    ids, mask = batch()
    alone = peft.PeftModel.from_pretrained(classifier(), tmp_path / "rm").eval()
    with torch.no_grad():
        expected = alone(input_ids=ids, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(
        roles.score(ids, mask, ["reward"])["reward"], expected, rtol=1e-4, atol=1e-4
    )


def test_without_files_policy_and_reference_are_the_base_and_values_are_zero():
    roles, (ids, mask) = rlhf.RoleModel(causal(), r=8), batch()
    out = roles.score(ids, mask, ALL)
    assert torch.equal(out["policy"], out["reference"]) and not out["value"].any()
    with torch.no_grad():
        torch.testing.assert_close(out["policy"].double(), logprobs_of(causal(), ids, mask))


def test_a_policy_starts_as_its_reference_and_the_value_as_the_reward(tmp_path):
    sft_folder(tmp_path / "sft")
    reward_folder(tmp_path / "rm")
    roles = rlhf.RoleModel(causal(), r=2, reference=tmp_path / "sft", reward=tmp_path / "rm")
    ids, mask = batch()
    out = roles.score(ids, mask, ALL, divergence="kl")
    assert torch.equal(out["policy"], out["reference"]) and not out["divergence"].any()
    assert not out["value"].any()
    with torch.no_grad():
        roles.value_head.weight.copy_(roles.reward_head.weight)
    out = roles.score(ids, mask, ALL)
    last = mask.sum(1) - 1
    assert torch.equal(out["value"][torch.arange(3), last], out["reward"])


@pytest.mark.parametrize("isa", lk.backends.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("left", [False, True])
def test_the_first_ratio_is_1_in_every_bit(dtype, left, isa, monkeypatch):
    """Whatever batch scored a sequence and whatever micro-batch trains it; of few tokens or of many at a time."""
    roles = randomize(rlhf.RoleModel(causal(dtype=dtype), r=8))
    ids, mask = batch(rows=7, columns=9, left=left)
    with lk.backends.use_isa(isa):
        old = roles.score(ids, mask, ALL, divergence="kl")
        for size in (1, 2, 7):
            for start in range(0, 7, size):
                part = slice(start, start + size)
                new = roles(ids[part], mask[part])["policy"]
                assert new.requires_grad and torch.equal(new, old["policy"][part])
        monkeypatch.setattr(rlhf.roles, "_TOKENS", 50)
        some_at_a_time = roles.score(ids, mask, ALL, divergence="kl")
        assert all(torch.equal(some_at_a_time[name], old[name]) for name in old)


def test_more_tokens_than_one_forward_has_train_as_one_batch(roles, monkeypatch):
    ids, mask = batch(rows=5, columns=9)
    texts = batch(rows=2, columns=12)

    def gradients():
        roles.zero_grad()
        out = roles(ids, mask, texts=texts)
        sum(x.square().sum() for x in out.values()).backward()
        return {n: p.grad.clone() for n, p in roles.named_parameters() if p.grad is not None}

    at_once = gradients()
    monkeypatch.setattr(rlhf.roles, "_TOKENS", 30)  # seven parts, some of them without texts
    for name, grad in gradients().items():
        torch.testing.assert_close(grad, at_once[name], rtol=1e-4, atol=1e-5)


def test_one_backward_gives_the_gradients_of_two(roles):
    ids, mask = batch()

    def gradients(wanted):
        roles.zero_grad()
        out = roles(ids, mask, wanted)
        sum(out[role].square().sum() for role in wanted).backward()
        return {n: p.grad.clone() for n, p in roles.named_parameters() if p.grad is not None}

    together, policy, value = (gradients(w) for w in (["policy", "value"], ["policy"], ["value"]))
    # The other one's are there, as zeros.
    for name, gradient in together.items():
        alone = (value if "value" in name else policy)[name]
        torch.testing.assert_close(gradient, alone, rtol=1e-4, atol=1e-5)
    assert any("lora_B.policy" in name for name in together) and "value_head.weight" in together


def test_training_changes_policy_and_value_and_nothing_else(roles):
    before = {name: tensor.clone() for name, tensor in roles.state_dict().items()}
    ids, mask = batch()
    frozen = roles.score(ids, mask, ["reference", "reward"])
    optimizer = torch.optim.SGD([p for p in roles.parameters() if p.requires_grad], lr=0.1)
    out = roles(ids, mask)
    (out["policy"].sum() + out["value"].square().sum()).backward()
    optimizer.step()
    after = roles.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(
        ".policy." in n or ".value." in n or n == "value_head.weight" for n in changed
    )
    again = roles.score(ids, mask, ["reference", "reward"])
    assert all(torch.equal(frozen[role], again[role]) for role in frozen)


def test_saved_roles_load_in_peft_and_here(roles, tmp_path):
    ids, mask = batch()
    out = roles.score(ids, mask, ALL)
    roles.save(tmp_path / "out")
    policy = peft.PeftModel.from_pretrained(causal(), tmp_path / "out" / "policy").eval()
    value = peft.PeftModel.from_pretrained(classifier(), tmp_path / "out" / "value").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            out["policy"].double(), logprobs_of(policy, ids, mask), rtol=1e-5, atol=1e-5
        )
        score = value(input_ids=ids, attention_mask=mask).logits[:, 0]
    last = mask.sum(1) - 1
    torch.testing.assert_close(out["value"][torch.arange(3), last], score, rtol=1e-4, atol=1e-4)
    folders = {name: tmp_path / folder for name, folder in
               (("reference", "sft"), ("reward", "rm"), ("policy", "out/policy"), ("value", "out/value"))}  # fmt: skip
    again = rlhf.RoleModel(causal(), **folders).score(ids, mask, ALL)
    assert all(torch.equal(out[role], again[role]) for role in ALL)


def test_load_keeps_the_parameters(roles, tmp_path):
    ids, mask = batch()
    out = roles.score(ids, mask, ALL)
    roles.save(tmp_path / "out")
    parameters = [p for p in roles.parameters() if p.requires_grad]
    randomize(roles, seed=8)
    roles.load(tmp_path / "out")
    assert all(
        a is b for a, b in zip(parameters, [p for p in roles.parameters() if p.requires_grad])
    )
    again = roles.score(ids, mask, ALL)
    assert all(torch.equal(out[role], again[role]) for role in ALL)
    other = rlhf.RoleModel(causal(), r=4)
    with pytest.raises(
        ValueError, match="expected the layers and ranks of this model's adapter 'policy'"
    ):
        other.load(tmp_path / "out")


def test_entropy_and_exact_divergence(roles, tmp_path):
    ids, mask = batch(ragged=False)
    out = roles(ids, mask, ["policy", "reference"], entropy=True, divergence="kl")
    with torch.no_grad():
        policy = roles.model(ids).logits[:, :-1].double().log_softmax(-1)
        lk.load_adapter(roles.model, tmp_path / "sft", "again")
        reference = roles.model(ids).logits[:, :-1].double().log_softmax(-1)
    entropy = -(policy.exp() * policy).sum(-1)
    torch.testing.assert_close(out["entropy"].double(), entropy, rtol=1e-4, atol=1e-5)
    kl = (policy.exp() * (policy - reference)).sum(-1)
    torch.testing.assert_close(out["divergence"].double(), kl, rtol=1e-3, atol=1e-5)


def test_only_the_tokens_asked_for_have_log_probabilities(roles):
    ids, mask = batch()
    where = torch.zeros(3, 8, dtype=torch.bool)
    where[:, 4:] = True
    whole, part = (
        roles.score(ids, mask, ["policy"]),
        roles.score(ids, mask, ["policy"], where=where),
    )
    assert torch.equal(part["policy"], whole["policy"].where(where, 0))


def test_temperature_divides_the_logits():
    ids, mask = batch(ragged=False)
    roles = randomize(rlhf.RoleModel(causal(), r=8, temperature=2.0))
    with torch.no_grad():
        logits = roles.model(ids).logits[:, :-1].double() / 2
    expected = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    out = roles.score(ids, mask, ["policy"])["policy"]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_four_roles_cost_little_more_than_the_policy_alone(tmp_path):
    """Bytes of all parameters and pages, of a model whose layers outweigh its adapters as they do in practice."""
    sizes = dict(
        hidden_size=512, intermediate_size=1536, num_attention_heads=8, num_key_value_heads=8
    )
    model = causal(r=0, **sizes)
    bytes_of_base = sum(t.nbytes for t in model.state_dict().values())
    roles = rlhf.RoleModel(model, r=8)
    own = sum(p.nbytes for p in lk.adapters(model)["policy"].parameters)
    frozen = sum(t.nbytes for n, t in roles.state_dict().items() if "lora" not in n)
    assert (frozen + roles.bank.nbytes) / (bytes_of_base + own) <= 1.3


def test_checkpointing_changes_no_gradient(roles):
    ids, mask = batch()
    roles.train()

    def gradients():
        roles.zero_grad()
        out = roles(ids, mask)
        (out["policy"].sum() + out["value"].square().sum()).backward()
        return [p.grad.clone() for p in roles.parameters() if p.requires_grad]

    plain = gradients()
    roles.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


def test_generate_is_the_policy_s(roles):
    ids, mask = batch(left=True)
    tokens = roles.generate(ids, mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = roles.model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert torch.equal(tokens, expected)


def test_on_another_device_the_pages_are_made_anew(roles, monkeypatch, tmp_path):
    """As a trainer moves a model to its GPU: here the pages claim to be elsewhere."""
    ids, mask = batch()
    before, old = roles.score(ids, mask, ALL), roles.bank
    trained = [p for p in roles.parameters() if p.requires_grad]
    monkeypatch.chdir(tmp_path.parent)
    assert roles.to("cpu").bank is old
    old.device = torch.device("meta")
    assert roles.to("cpu").bank is not old
    assert all(torch.equal(before[role], x) for role, x in roles.score(ids, mask, ALL).items())
    out = roles(ids, mask)
    (out["policy"].sum() + out["value"].square().sum()).backward()
    now = [p for p in roles.parameters() if p.requires_grad]
    assert all(a is b for a, b in zip(trained, now, strict=True))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in now)
    with torch.no_grad():
        for parameter in now:
            parameter.add_(0.01)
    assert not torch.equal(roles.score(ids, mask, ["policy"])["policy"], before["policy"])


# -- errors ----------------------------------------------------------------------------------------


def test_models_that_are_refused():
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES_OF_DENSE}))
    for model, error, message in (
        (dense, ValueError, "expected its linear layers in 4 bits"),
        (classifier(), TypeError, "expected a causal language model of transformers"),
        (torch.nn.Linear(4, 4), TypeError, "expected a causal language model"),
        ("model", TypeError, r"expected a torch\.nn\.Module"),
        (causal(attention_dropout=0.1), ValueError, "expected no dropout"),
    ):
        with pytest.raises(error, match=message):
            rlhf.RoleModel(model)


SIZES_OF_DENSE = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2,
)  # fmt: skip


def test_logits_of_another_kind_are_refused():
    model = causal()
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: head(x)
    model.forward_of_others = model.forward

    def shifted(*args, **kwargs):
        out = model.forward_of_others(*args, **kwargs)
        out.logits = out.logits + 1.0
        return out

    model.forward = shifted
    with pytest.raises(
        ValueError, match="expected logits that are the head of the last hidden state"
    ):
        rlhf.RoleModel(model)


def test_capped_logits_are_capped():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, final_logit_softcapping=0.5, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config).eval()
    lk.replace_linear(model, r=0, progress=False)
    ids, mask = batch(ragged=False)
    roles = rlhf.RoleModel(model, r=8)
    with torch.no_grad():
        expected = logprobs_of(model, ids, mask)
    torch.testing.assert_close(roles.score(ids, mask, ["policy"])["policy"].double(), expected)


def test_a_reward_without_a_head_is_refused(tmp_path):
    sft_folder(tmp_path / "sft")
    with pytest.raises(
        ValueError,
        match=r"expected an adapter with a head of one score, score\.weight \(1, 64\), got none",
    ):
        rlhf.RoleModel(causal(), reward=tmp_path / "sft")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ids=torch.zeros(3, 9)), r"ids: expected integers \[B, S\]"),
        (dict(mask=torch.ones(3, 8)), r"mask: expected \[3, 9\]"),
        (dict(mask=torch.zeros(3, 9)), "mask: expected a token in every row"),
        (dict(roles=["policy", "critic"]), "roles: expected some of .*, got 'critic'"),
        (dict(roles="policy"), "roles: expected some of"),
        (dict(where=torch.ones(3, 9)), r"where: expected booleans \[3, 8\]"),
        (dict(roles=["policy"], divergence="kl"), "divergence: expected policy and reference among roles"),
        (dict(divergence="renyi"), "name: expected one of"),
    ],
)  # fmt: skip
def test_arguments_that_are_refused(roles, change, message):
    ids, mask = batch()
    with pytest.raises(ValueError, match=message):
        roles.score(**(dict(ids=ids, mask=mask, roles=ALL) | change))
