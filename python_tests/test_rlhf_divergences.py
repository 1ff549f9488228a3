"""Divergences: their two forms against exact sums over a vocabulary, and what each penalty does to a policy."""

import itertools
import math

import pytest
import torch

from lowrank_kernels.rlhf import divergences

PROPER = ("kl", "js", "forward_kl", "tv", "chi2", "none")
OF_THE_PAPER = ("bregman", "squared", "clamped_kl", "js_sun2023")


def two(seed=0, size=50, spread=1.0):
    """Logits of p and q, float64."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(2, size, generator=generator, dtype=torch.float64)


def textbook(name, p, q):
    """The divergence as a book has it."""
    m = (p + q) / 2
    return {
        "kl": lambda: (p * (p / q).log()).sum(),
        "forward_kl": lambda: (q * (q / p).log()).sum(),
        "js": lambda: 0.5 * (p * (p / m).log()).sum() + 0.5 * (q * (q / m).log()).sum(),
        "tv": lambda: 0.5 * (p - q).abs().sum(),
        "chi2": lambda: ((q - p).square() / p).sum(),
        "none": lambda: torch.zeros((), dtype=p.dtype),
        "bregman": lambda: (p * (q / p - 1 - (q / p).log())).sum(),
        "squared": lambda: (p * (p / q).log().square() / 2).sum(),
        "clamped_kl": lambda: (p * (p / q).log().clamp(min=0)).sum(),
        "js_sun2023": lambda: (p * ((p / m).log().clamp(min=0) + (q / m).log().clamp(min=0)) / 2).sum(),
    }[name]()  # fmt: skip


def test_names():
    assert set(divergences.NAMES) == {*PROPER, *OF_THE_PAPER}


@pytest.mark.parametrize("name", divergences.NAMES)
@pytest.mark.parametrize("spread", [1e-3, 1.0, 5.0])
def test_exact_is_the_textbook_s(name, spread):
    p, q = two(spread=spread)
    expected = textbook(name, p.softmax(0), q.softmax(0))
    torch.testing.assert_close(divergences.exact(name, p, q), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", divergences.NAMES)
def test_the_value_is_unbiased_and_never_negative(name):
    p, q = two()
    logp, logq = p.log_softmax(0), q.log_softmax(0)
    values = divergences.value(name, logp, logq)
    assert (values >= 0).all()
    torch.testing.assert_close((logp.exp() * values).sum(), divergences.exact(name, p, q))


@pytest.mark.parametrize("name", PROPER)
def test_the_policy_gradient_of_the_reward_form_is_the_divergence_s(name):
    p, q = two()
    p.requires_grad_()
    exact = divergences.exact(name, p, q)
    expected = torch.zeros_like(p) if name == "none" else torch.autograd.grad(exact, p)[0]
    logp = p.log_softmax(0)
    penalty = divergences.reward_penalty(name, logp, q.log_softmax(0)).detach()
    surrogate = (logp.exp().detach() * logp * penalty).sum()
    torch.testing.assert_close(torch.autograd.grad(surrogate, p)[0], expected)


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_the_penalties_of_the_paper_have_another_gradient(name):
    """Both forms are the penalty itself, and its policy gradient is no gradient of its mean."""
    p, q = two()
    p.requires_grad_()
    logp, logq = p.log_softmax(0), q.log_softmax(0)
    penalty = divergences.reward_penalty(name, logp, logq)
    assert torch.equal(penalty, divergences.value(name, logp, logq))
    of_mean = torch.autograd.grad(divergences.exact(name, p, q), p, retain_graph=True)[0]
    of_reward = torch.autograd.grad((logp.exp().detach() * logp * penalty.detach()).sum(), p)[0]
    assert (of_mean - of_reward).norm() > 0.1 * of_mean.norm()


BANDIT = ("kl", "clamped_kl", "squared", "bregman", "js_sun2023", "none")


def at_the_optimum(name, beta=0.5, actions=10):
    """KL(p, q) of the policy that gradient ascent on E_p[reward - beta penalty] ends in."""
    generator = torch.Generator().manual_seed(3)
    reward = torch.rand(actions, generator=generator, dtype=torch.float64)
    q = torch.randn(actions, generator=generator, dtype=torch.float64).log_softmax(0)
    logits = q.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(1500):
        logp = logits.log_softmax(0)
        total = reward - beta * divergences.reward_penalty(name, logp, q).detach()
        p = logp.exp().detach()
        loss = -(p * logp * (total - (p * total).sum())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    p = logits.detach().log_softmax(0)
    best = (q + reward / beta).log_softmax(0)
    return divergences.exact("kl", p, q).item(), divergences.exact("kl", best, q).item()


def test_a_bandit_ends_at_its_optimum_under_kl_and_drifts_under_the_others():
    found = {name: at_the_optimum(name)[0] for name in BANDIT}
    optimum = at_the_optimum("kl")[1]
    assert found["kl"] == pytest.approx(optimum, rel=1e-3)
    order = ["kl", "clamped_kl", "squared", "bregman", "none"]
    assert all(found[a] < found[b] for a, b in itertools.pairwise(order)), found
    assert found["js_sun2023"] > found["bregman"]  # bounded: it holds back least


@pytest.mark.parametrize("name", ["kl", "js", "forward_kl", "chi2"])
def test_the_gradient_vanishes_at_the_optimum_of_the_reward_form(name):
    """At p with reward = beta (f(r) - r f'(r)) + c no action is better than another."""
    logp = torch.randn(10, generator=torch.Generator().manual_seed(1)).double().log_softmax(0)
    q = torch.randn(10, generator=torch.Generator().manual_seed(2)).double()
    reward = divergences.reward_penalty(name, logp, q.log_softmax(0))
    logits = logp.clone().requires_grad_()
    objective = (logits.softmax(0) * reward).sum() - divergences.exact(name, logits, q)
    torch.testing.assert_close(
        torch.autograd.grad(objective, logits)[0],
        torch.zeros(10, dtype=torch.float64),
        rtol=0,
        atol=1e-9,
    )


@pytest.mark.parametrize("name", divergences.NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_extremes_are_finite(name, dtype):
    d = torch.tensor([-1e4, -100.0, -1e-4, 0.0, 1e-4, 100.0, 1e4], dtype=dtype)
    for form in (divergences.value, divergences.reward_penalty):
        out = form(name, d, torch.zeros_like(d))
        assert out.dtype == torch.promote_types(dtype, torch.float32)
        assert out.isfinite().all(), (form, out)
    assert divergences.value(name, d, torch.zeros_like(d))[3] == 0


@pytest.mark.parametrize("name", PROPER)
def test_small_differences_do_not_cancel(name):
    d = torch.tensor([1e-3, -1e-3, 1e-2, -1e-2])
    expected = divergences.value(name, d.double(), torch.zeros(4).double())
    out = divergences.value(name, d, torch.zeros(4))
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", divergences.NAMES)
def test_tokens_without_probability(name):
    """In both distributions: nothing. Where q alone has none, KL is infinite and the bounded ones are not."""
    p, q = two(size=6)
    wider = (
        torch.cat([p, torch.tensor([-math.inf]).double()]),
        torch.cat([q, torch.tensor([-math.inf]).double()]),
    )
    torch.testing.assert_close(divergences.exact(name, *wider), divergences.exact(name, p, q))
    x = wider[0].clone().requires_grad_()
    if name != "none":
        divergences.exact(name, x, wider[1]).backward()
        assert x.grad[:-1].isfinite().all()
    missing = q.clone()
    missing[0] = -math.inf
    out = divergences.exact(name, p, missing)
    infinite = {"kl", "bregman", "squared", "clamped_kl"}
    assert out.isinf() if name in infinite else out.isfinite()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: divergences.value("renyi", x, x), ValueError, "name: expected one of kl, js, .*'renyi'"),
        (lambda x: divergences.reward_penalty("KL", x, x), ValueError, "name: expected one of"),
        (lambda x: divergences.exact("kl", x, x[:, :2]), ValueError, r"logits_q: expected the shape of logits_p"),
        (lambda x: divergences.value("kl", x, x[0]), ValueError, r"logq: expected the shape of logp, \(3, 4\)"),
        (lambda x: divergences.value("kl", x.long(), x), TypeError, "logp: expected a floating tensor"),
        (lambda x: divergences.value("kl", x, [1.0]), TypeError, "logq: expected a floating tensor, got list"),
        (lambda x: divergences.exact("kl", x[:, :0], x[:, :0]), ValueError, r"logits_p: expected \[\.\.\., V\]"),
    ],
)  # fmt: skip
def test_arguments_that_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 4))
