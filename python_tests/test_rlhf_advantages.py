"""Advantages against the double sum, whitening and statistics over processes, token rewards, β's control."""

import pytest
import torch

from lowrank_kernels import rlhf


def ragged(rows=5, columns=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, columns + 1, (rows,), generator=generator)
    starts = torch.randint(0, columns, (rows,), generator=generator) % (columns - lengths + 1)
    at = torch.arange(columns)
    mask = (at >= starts[:, None]) & (at < (starts + lengths)[:, None])
    return rewards, values, mask


def double_sum(rewards, values, mask, gamma, lam):
    """``A_t = Σ_l (gamma lam)^l δ_{t+l}`` over the tokens of each row."""
    advantages = torch.zeros_like(rewards)
    for row in range(len(rewards)):
        kept = mask[row].nonzero()[:, 0].tolist()
        r, v = rewards[row, kept], torch.cat([values[row, kept], torch.zeros(1).double()])
        for t in range(len(kept)):
            for i in range(t, len(kept)):
                advantages[row, kept[t]] += (gamma * lam) ** (i - t) * (
                    r[i] + gamma * v[i + 1] - v[i]
                )
    return advantages


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_gae_is_the_double_sum(gamma, lam):
    rewards, values, mask = ragged()
    advantages, returns = rlhf.gae(rewards, values, mask, gamma, lam)
    expected = double_sum(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, (expected + values).where(mask, 0))


def test_gae_passes_over_holes_and_ignores_what_lies_there():
    rewards, values, _ = ragged()
    mask = torch.rand(rewards.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[0] = False
    expected = rlhf.gae(rewards, values, mask)
    torch.testing.assert_close(expected[0], double_sum(rewards, values, mask, 1.0, 0.95))
    spoilt = rlhf.gae(rewards.where(mask, torch.nan), values.where(mask, torch.nan), mask.long())
    assert all(torch.equal(a, b) for a, b in zip(expected, spoilt))


def test_lambda_1_is_the_return_and_lambda_0_one_step():
    rewards, values, mask = ragged()
    mask[:] = True
    _, returns = rlhf.gae(rewards, values, mask, lam=1.0)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1))
    advantages, _ = rlhf.gae(rewards, values, mask, lam=0.0)
    after = torch.cat([values[:, 1:], torch.zeros(5, 1).double()], 1)
    torch.testing.assert_close(advantages, rewards + after - values)


def test_gae_of_16_bits_is_float32_without_gradients():
    rewards, values, mask = ragged()
    values = values.bfloat16().requires_grad_()
    advantages, returns = rlhf.gae(rewards.bfloat16(), values, mask)
    assert advantages.dtype == returns.dtype == torch.float32 and not returns.requires_grad


def test_token_rewards_have_the_score_at_the_last_token():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]])
    penalty = torch.arange(12.0).view(3, 4)
    out = rlhf.token_rewards(torch.tensor([10.0, 20.0, 30.0]), penalty, mask, 0.5)
    expected = torch.tensor([[0, -0.5, 9, 0], [-2, -2.5, -3, 16.5], [0, 0, 25, 0]])
    assert torch.equal(out, expected)


@pytest.mark.parametrize("shift", [True, False])
def test_whitening_over_processes_is_whitening_of_all(shift):
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(2)) * 3 + 5
    mask = torch.rand(6, 7, generator=torch.Generator().manual_seed(3)) < 0.7
    whole = rlhf.whiten(x, mask, shift)
    kept = x[mask].double()
    expected = (x - kept.mean()) / (kept.var() + 1e-8).sqrt() + (0.0 if shift else kept.mean())
    torch.testing.assert_close(whole, expected.float().where(mask, 0), rtol=1e-5, atol=1e-5)
    # Two processes, whose sums are added.
    other_x, other_mask = x[2:], mask[2:]
    count, total = other_mask.sum().double(), other_x[other_mask].double().sum()
    mean = kept.mean()
    sums = [torch.stack([count, total]), (other_x[other_mask].double() - mean).square().sum()[None]]
    part = rlhf.whiten(x[:2], mask[:2], shift, reduce=lambda tensor: tensor + sums.pop(0))
    torch.testing.assert_close(part, whole[:2], rtol=1e-5, atol=1e-5)


def test_statistics_of_parts_are_those_of_all_and_a_state_goes_on():
    scores = torch.randn(40, generator=torch.Generator().manual_seed(4)) * 2 - 7
    statistics = rlhf.ScoreStatistics()
    for part in scores[:30].split(7):
        statistics.update(part)
    again = rlhf.ScoreStatistics()
    again.load_state_dict(statistics.state_dict())
    again.update(scores[30:])
    assert again.mean == pytest.approx(scores.double().mean().item())
    assert again.sd == pytest.approx(scores.double().std(unbiased=False).item())
    normal = again.normalize(scores)
    assert normal.mean().abs() < 1e-5 and (normal.std(unbiased=False) - 1).abs() < 1e-5


def test_adaptive_control_is_the_formula():
    control = rlhf.AdaptiveKL(0.2, target=6.0, horizon=1000)
    for kl, error in ((6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (0.0, -0.2)):
        before = control.value
        control.update(kl, 50)
        assert control.value == pytest.approx(before * (1 + error * 50 / 1000))
    other = rlhf.AdaptiveKL(1.0)
    other.load_state_dict(control.state_dict())
    assert other.value == control.value


X, MASK = torch.zeros(2, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rlhf.gae(X[0], X[0], MASK[0]), r"rewards: expected \[B, T\], got \[3\]"),
        (lambda: rlhf.gae(X, X[:, :2], MASK), "values: expected the shape of rewards"),
        (lambda: rlhf.gae(X, X, MASK[:1]), "mask: expected the shape of rewards"),
        (lambda: rlhf.gae(X, X, MASK * 2), "mask: expected booleans, or 0 and 1"),
        (lambda: rlhf.gae(X, X, MASK, gamma=1.5), "gamma: expected a number from 0 to 1"),
        (lambda: rlhf.gae(X, X, MASK, lam=float("nan")), "lam: expected a number from 0 to 1"),
        (lambda: rlhf.token_rewards(X[0], X, MASK, 1.0), r"scores: expected \[2\]"),
        (lambda: rlhf.token_rewards(X[:, 0], X, MASK * 0, 1.0), "mask: expected a token in every row"),
        (lambda: rlhf.whiten(X, MASK * 0), "mask: expected it to keep an element"),
        (lambda: rlhf.whiten(X, MASK[0]), "mask: expected the shape of x"),
        (lambda: rlhf.ScoreStatistics().update(X + torch.nan), "scores: expected finite numbers"),
        (lambda: rlhf.FixedKL(-1.0), "coef: expected a number >= 0"),
        (lambda: rlhf.FixedKL(float("inf")), "coef: expected a number >= 0"),
        (lambda: rlhf.AdaptiveKL(0.0), "coef: expected a number > 0"),
        (lambda: rlhf.AdaptiveKL(0.1, target=0.0), "target: expected a number > 0"),
        (lambda: rlhf.AdaptiveKL(0.1).update(float("nan"), 1), "kl: expected a finite number"),
        (lambda: rlhf.AdaptiveKL(0.1, horizon=10).update(1.0, 11), "n: expected a number from 0 to the horizon"),
    ],
)  # fmt: skip
def test_arguments_that_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
