"""Spectra against a dense SVD, truncation against the best matrix of its rank, forgetting against plain forwards."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import lowrank_kernels as lk
from lowrank_kernels import analysis, rlhf
from rlhf_models import causal
from tiny_experts import dense


def small(r=8, alpha=24, rslora=False, N=48, K=64, seed=0, dtype=torch.float32):
    """One layer with a random adapter whose ranks matter less and less."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(K, N))
    lk.replace_linear(
        model, r=r, lora_alpha=alpha, use_rslora=rslora, adapter_dtype=dtype, progress=False
    )
    with torch.no_grad():
        model[0].lora_B["default"].weight.copy_(torch.randn(N, r) * 2.0 ** -torch.arange(r))
    return model


def delta(layer, name="default"):
    A, B = (p.detach().double() for p in layer.adapter_parameters(name))
    return layer.scaling[name] * B @ A


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("r", "N", "K"), [(8, 48, 64), (1, 32, 64), (40, 24, 64), (40, 48, 32)])
def test_the_spectrum_is_that_of_the_dense_matrix(rslora, r, N, K):
    model = small(r=r, rslora=rslora, N=N, K=K)
    of = analysis.spectrum(model, relative=True)["0"]
    dense = torch.linalg.svdvals(delta(model[0]))[: min(r, N, K)]
    torch.testing.assert_close(of.singular_values, dense, rtol=1e-9, atol=1e-9 * dense[0].item())
    assert of.r == r and of.norm == pytest.approx(dense.norm().item())
    assert of.stable_rank == pytest.approx((dense.square().sum() / dense[0] ** 2).item())
    share = dense.norm() / model[0].weight4bit.dequantize(torch.float32).double().norm()
    assert of.relative_norm == pytest.approx(share.item(), rel=1e-5)
    for energy in (0.5, 0.9, 0.999, 1.0):
        k = of.rank(energy)
        squares = dense.square()
        assert squares[:k].sum() >= (energy - 1e-9) * squares.sum()
        assert k == 1 or squares[: k - 1].sum() < energy * squares.sum()


@pytest.mark.parametrize("into", [None, "small"])
@pytest.mark.parametrize("rslora", [False, True])
def test_truncation_is_the_closest_matrix_of_its_rank(into, rslora, tmp_path):
    model = small(rslora=rslora)
    whole, scaling = delta(model[0]), model[0].scaling["default"]
    ranks = analysis.truncate(model, energy=0.9, into=into)
    k, name = ranks["0"], into or "default"
    U, s, V = torch.linalg.svd(whole, full_matrices=False)
    best = U[:, :k] * s[:k] @ V[:k]
    torch.testing.assert_close(delta(model[0], name), best, rtol=1e-4, atol=1e-5)
    assert model[0].r[name] == k < 8 and model[0].scaling[name] == pytest.approx(scaling)
    assert analysis.spectrum(model, name)["0"].norm ** 2 >= 0.9 * whole.norm() ** 2
    if into:
        assert torch.equal(delta(model[0]), whole)
    else:
        assert model[0].active_adapter == "default"
        assert model[0].lora_A["default"].weight.requires_grad


def test_ranks_that_differ_are_in_the_file_and_load_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = causal(r=8)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i, parameter in enumerate(lk.adapters(model)["default"].parameters):
            scale = 2.0 ** -(torch.arange(8) * (i % 3))
            shape = [8, 1] if i % 2 == 0 else [1, 8]
            parameter.copy_(
                0.1 * torch.randn(parameter.shape, generator=generator) * scale.view(shape)
            )
    ranks = analysis.truncate(model, energy=0.95)
    assert len(set(ranks.values())) > 1
    lk.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    loaded = peft.PeftModel.from_pretrained(causal(), tmp_path).eval()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.shape[0] for k, t in keys.items() if "lora_A" in k} == set(ranks.values())


def test_an_adapter_of_zeros_keeps_a_rank():
    model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    lk.replace_linear(model, r=4, progress=False)
    of = analysis.spectrum(model)["0"]
    assert (of.rank(), of.stable_rank, of.norm) == (0, 0.0, 0.0)
    assert analysis.truncate(model) == {"0": 1}
    model(torch.randn(2, 64)).sum().backward()


def test_the_dtype_of_an_adapter_stays():
    model = small(dtype=torch.bfloat16)
    analysis.truncate(model)
    assert model[0].lora_A["default"].weight.dtype == torch.bfloat16


def test_experts_are_rows_of_their_own():
    model = dense("qwen3_moe")
    lk.replace_linear(model, r=4, target_parameters=["mlp.experts.down_proj"], progress=False)
    layers = lk.adapters(model)["default"].layers
    path, layer = next((p, l) for p, l in layers.items() if p.endswith("down_proj"))
    with torch.no_grad():
        for parameter in layer.adapter_parameters("default"):
            parameter.normal_()
    A, B, scaling = layer.factors("default")
    whole = (scaling * B.double() @ A.double()).detach()
    found = analysis.spectrum(model)
    for e in range(layer.num_experts):
        expected = torch.linalg.svdvals(whole[e])[:4]
        torch.testing.assert_close(found[f"{path}[{e}]"].singular_values, expected)
    analysis.truncate(model, energy=1.0)
    A, B, scaling = layer.factors("default")
    torch.testing.assert_close((scaling * B @ A).double(), whole, rtol=1e-4, atol=1e-4)


def test_the_table_names_every_layer():
    table = str(analysis.spectrum(small(), relative=True))
    assert "rank for 90 %" in table and table.splitlines()[2].split()[:2] == ["0", "8"]


# -- forgetting ------------------------------------------------------------------------------------

TEXTS = [[5, 9, 11, 3, 8], [7, 4], [40, 30, 20, 10, 12, 13, 14], [6]]


def two_adapters():
    model = causal(r=8)
    lk.add_adapter(model, "other", r=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in lk.adapters(model).values():
            for parameter in adapter.parameters:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def plain(model, texts):
    """Sums over tokens of the negative log-likelihood and the entropy, text by text."""
    nll = entropy = 0.0
    for text in texts:
        with torch.no_grad():
            logp = model(torch.tensor([text])).logits[0, :-1].double().log_softmax(-1)
        nll -= logp.gather(1, torch.tensor(text[1:])[:, None]).sum().item()
        entropy -= (logp.exp() * logp).sum().item()
    tokens = sum(len(text) - 1 for text in texts)
    return nll / tokens, entropy / tokens


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_forgetting_is_the_plain_forwards(batch_size):
    model = two_adapters()
    model.train()
    seen = analysis.forgetting(model, TEXTS, ["default", "other"], batch_size=batch_size)
    assert model.training and list(seen) == ["base", "default", "other"] and seen.tokens == 11
    model.eval()
    for name, row in seen.items():
        with lk.disable_adapters(model) if name == "base" else lk.set_adapter(model, name):
            nll, entropy = plain(model, TEXTS)
        assert row.nll == pytest.approx(nll, rel=1e-4) and row.entropy == pytest.approx(
            entropy, rel=1e-4
        )
    assert seen.forgotten("base") == 0 and "over base" in str(seen)


def test_adapters_of_a_role_model_are_measured_where_they_live():
    roles = rlhf.RoleModel(causal(), r=8)
    seen = analysis.forgetting(roles.model, TEXTS, ["policy"])
    assert seen.forgotten("policy") == 0
    assert roles.bank.adapters == ("policy", "value")


def test_the_callback_logs(tmp_path):
    model = causal(r=8)
    rows = [{"input_ids": text, "labels": text} for text in [[5, 9, 11, 3]] * 8]
    callback = analysis.ForgettingCallback(TEXTS, ["default"], steps=2)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to="none", use_cpu=True, save_strategy="no",
        learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    assert [step for step, _ in callback.history] == [0, 2, 4]
    logged = [log for log in trainer.state.log_history if "forgetting/nll/default" in log]
    assert [log["step"] for log in logged] == [0, 2, 4]
    assert logged[0]["forgetting/nll/default"] == pytest.approx(logged[0]["forgetting/nll/base"])
    assert logged[-1]["forgetting/nll/default"] != logged[-1]["forgetting/nll/base"]


def test_distinct_n_grams():
    assert analysis.distinct([[1, 1, 1, 1]], 1) == 0.25
    assert analysis.distinct([[1, 2], [3, 4]], 2) == 1.0
    assert analysis.distinct([[1]], 2) == 0.0
    assert analysis.distinct(iter([torch.tensor([1, 2, 1, 2]).tolist()]), 2) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: analysis.spectrum(m, "x"), ValueError, "name: expected an adapter of the model, one of"),
        (lambda m: analysis.truncate(m, energy=0.0), ValueError, "energy: expected a number above 0"),
        (lambda m: analysis.truncate(m, into="other"), ValueError, "into: expected a new adapter, got 'other'"),
        (lambda m: analysis.forgetting(m, TEXTS, ["x"]), ValueError, "names: expected adapters of the model"),
        (lambda m: analysis.forgetting(m, TEXTS, []), ValueError, "names: expected a list"),
        (lambda m: analysis.forgetting(m, TEXTS, "default"), ValueError, "names: expected a list"),
        (lambda m: analysis.forgetting(m, [[1]], ["other"]), ValueError, "texts: expected one of two tokens"),
        (lambda m: analysis.forgetting(m, "a text", ["other"]), TypeError, "texts: expected a list"),
        (lambda m: analysis.forgetting(m, ["a text"], ["other"]), ValueError, "tokenizer: expected one for texts"),
        (lambda m: analysis.distinct([[1]], 0), ValueError, "n: expected an integer >= 1"),
        (lambda m: analysis.ForgettingCallback(TEXTS, ["other"], steps=0), ValueError, "steps: expected"),
    ],
)  # fmt: skip
def test_arguments_that_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(two_adapters())


def test_numbers_that_are_not_finite_are_refused():
    model = small()
    with torch.no_grad():
        model[0].lora_A["default"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="0: expected an adapter of finite numbers"):
        analysis.spectrum(model)
