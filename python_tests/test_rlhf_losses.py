"""PPO's losses: against formulas, against TRL's trainers on the same rows, and on a process whose optimum is known."""

import types

import pytest
import torch

from lowrank_kernels import rlhf

trl = pytest.importorskip("trl")


def rows(B=6, T=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    new, old, advantages = torch.randn(3, B, T, generator=generator)
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    mask = torch.arange(T) < lengths[:, None]
    return new.requires_grad_(), old, advantages, mask


def test_policy_loss_is_the_formula():
    new, old, A, mask = rows()
    out = rlhf.policy_loss(new, old, A, mask, cliprange=0.2)
    ratio = (new - old).exp()
    terms = torch.stack([-A * ratio, -A * ratio.clamp(0.8, 1.2)]).amax(0)[mask]
    torch.testing.assert_close(out.loss, terms.mean())
    torch.testing.assert_close(out.ratio, ratio[mask].mean())
    clipped = ((A > 0) & (ratio > 1.2)) | ((A < 0) & (ratio < 0.8))
    torch.testing.assert_close(out.clip_fraction, clipped[mask].float().mean())
    torch.testing.assert_close(
        out.approx_kl, (ratio - 1 - ratio.log())[mask].mean(), rtol=1e-4, atol=1e-6
    )
    gradient = torch.autograd.grad(out.loss, new)[0]
    assert not gradient[~mask].any() and not gradient[clipped].any()


def test_value_loss_is_the_formula():
    values, old, returns, mask = rows()
    out = rlhf.value_loss(values, old, returns, mask, cliprange=0.3)
    near = torch.minimum(torch.maximum(values, old - 0.3), old + 0.3)
    terms = torch.stack([(values - returns).square(), (near - returns).square()]).amax(0)
    torch.testing.assert_close(out.loss, terms[mask].mean() / 2)


def test_padding_counts_for_nothing_even_if_it_is_nan():
    new, old, A, mask = rows()
    expected = rlhf.policy_loss(new, old, A, mask).loss, rlhf.value_loss(new, old, A, mask).loss
    spoilt = [t.detach().where(mask, torch.nan).requires_grad_() for t in (new, old, A)]
    losses = rlhf.policy_loss(*spoilt, mask).loss, rlhf.value_loss(*spoilt, mask).loss
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    sum(losses).backward()
    assert spoilt[0].grad.isfinite().all() and not spoilt[0].grad[~mask].any()


def test_parts_of_a_batch_add_up_with_its_count():
    new, old, A, mask = rows()
    whole = rlhf.policy_loss(new, old, A, mask).loss
    parts = [
        rlhf.policy_loss(new[i], old[i], A[i], mask[i], count=mask.sum()).loss
        for i in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_a_broken_ratio_stays_finite():
    new = torch.tensor([[200.0, -200.0]], requires_grad=True)
    out = rlhf.policy_loss(new, torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2))
    out.loss.backward()
    assert out.loss.isfinite() and new.grad.isfinite().all()


# -- TRL -------------------------------------------------------------------------------------------


class _Metrics(dict):
    def __missing__(self, key):
        self[key] = _Metrics() if key in ("train", "eval") else []
        return self[key]


class _Fake:
    """What TRL's ``_compute_loss`` asks of its trainer, of which only the log-probabilities matter."""

    def __init__(self, trainer, logprobs, **changes):
        self.logprobs = logprobs
        self._metrics = {"train": _Metrics(), "eval": _Metrics()}
        self.model = types.SimpleNamespace(training=True)
        self.aux_loss_enabled = self._entropy_bonus_enabled = False
        self.accelerator = types.SimpleNamespace(
            gather=lambda t: t,
            reduce=lambda t, *_, **__: t,
            gather_for_metrics=lambda t: t,
            num_processes=1,
            process_index=0,
            unwrap_model=lambda m: m,
        )
        self.__dict__.update(changes)
        self._trainer = trainer

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self.logprobs, torch.zeros_like(self.logprobs), None

    def __getattr__(self, name):
        value = getattr(self.__dict__["_trainer"], name)
        return (
            value.__get__(self)
            if callable(value) and not isinstance(value, staticmethod)
            else value
        )


def test_group_normalised_advantages_give_grpo_s_loss():
    """TRL's GRPO without a reference, its loss over all tokens of the batch."""
    new, _, _, mask = rows(B=8)
    scores = torch.randn(2, 4, generator=torch.Generator().manual_seed(5))
    group = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)
    A = group.flatten()
    fake = _Fake(
        trl.GRPOTrainer, new, beta=0.0, loss_type="dapo", epsilon_low=0.2, epsilon_high=0.2, top_entropy_quantile=1.0,
        importance_sampling_level="token", use_vllm=False, vllm_importance_sampling_correction=False,
        off_policy_mask_threshold=None, current_gradient_accumulation_steps=1, tools=None,
        args=types.SimpleNamespace(delta=None, gradient_accumulation_steps=1, steps_per_generation=1,
                                   use_bias_correction_kl=False),
    )  # fmt: skip
    old = (new - 0.3 * torch.randn(new.shape, generator=torch.Generator().manual_seed(6))).detach()
    inputs = dict(
        prompt_ids=torch.zeros(8, 1).long(), prompt_mask=torch.ones(8, 1).long(),
        completion_ids=torch.zeros(mask.shape).long(), completion_mask=mask.long(), advantages=A,
        old_per_token_logps=old, num_items_in_batch=mask.sum(),
    )  # fmt: skip
    expected = trl.GRPOTrainer._compute_loss(fake, None, inputs)
    ours = rlhf.policy_loss(new, old, A[:, None].expand_as(new), mask).loss
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, new)[0], torch.autograd.grad(expected, new)[0]
    )


def test_leave_one_out_values_give_rloo_s_gradient():
    """No penalty, lambda 1, the value of a row the mean score of the others: RLOO's gradient, T times smaller."""
    B, T = 4, 5
    new = torch.randn(B, T, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask = torch.ones(B, T, dtype=torch.bool)
    scores = torch.randn(B, generator=torch.Generator().manual_seed(2))
    others = (scores.sum() - scores) / (B - 1)
    rewards = rlhf.token_rewards(scores, torch.zeros(B, T), mask, 0.0)
    values = others[:, None].expand(B, T)
    A, _ = rlhf.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    ours = torch.autograd.grad(rlhf.policy_loss(new, new.detach(), A, mask).loss, new)[0]
    fake = _Fake(
        trl.RLOOTrainer, new, epsilon_low=0.2, epsilon_high=0.2, top_entropy_quantile=1.0, beta=0.0,
        current_gradient_accumulation_steps=1, tools=None, args=types.SimpleNamespace(gradient_accumulation_steps=1),
    )  # fmt: skip
    inputs = dict(
        prompt_ids=torch.zeros(B, 1).long(), prompt_mask=torch.ones(B, 1).long(),
        completion_ids=torch.zeros(B, T).long(), completion_mask=mask.long(), advantages=scores - others,
        old_logps=new.detach().sum(1),
    )  # fmt: skip
    expected = torch.autograd.grad(trl.RLOOTrainer._compute_loss(fake, None, inputs), new)[0]
    torch.testing.assert_close(ours * T, expected)


def test_two_answers_give_trl_s_reward_loss():
    scores = torch.randn(5, 2, generator=torch.Generator().manual_seed(3)).requires_grad_()
    model = lambda **_: types.SimpleNamespace(logits=scores.T.reshape(-1, 1))  # noqa: E731 - chosen ones first
    fake = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True), args=types.SimpleNamespace(center_rewards_coefficient=None),
        accelerator=types.SimpleNamespace(gather_for_metrics=lambda t: t, gather=lambda t: t), _total_train_tokens=0,
        _tp_size=1, _metrics={"train": _Metrics()},
    )  # fmt: skip
    inputs = dict(attention_mask=torch.ones(10, 3))
    expected = trl.RewardTrainer.compute_loss(fake, model, inputs)
    ours = rlhf.ranking_loss(scores, torch.tensor([[1, 2]] * 5))
    torch.testing.assert_close(ours, expected)


# -- rankings --------------------------------------------------------------------------------------


def test_ranking_loss_is_the_mean_over_pairs_of_each_prompt():
    scores = torch.randn(3, 4, generator=torch.Generator().manual_seed(4)).requires_grad_()
    ranks = torch.tensor([[1, 2, 3, 4], [2, 1, 2, 1], [0, 0, 0, 0]])
    expected = []
    for row in range(2):
        pairs = [
            -torch.nn.functional.logsigmoid(scores[row, i] - scores[row, j])
            for i in range(4) for j in range(4) if ranks[row, i] < ranks[row, j]
        ]  # fmt: skip
        assert len(pairs) == (6, 4)[row]
        expected.append(sum(pairs) / len(pairs))
    loss = rlhf.ranking_loss(scores, ranks)
    torch.testing.assert_close(loss, sum(expected) / 2)
    assert not torch.autograd.grad(loss, scores)[0][2].any()  # ties alone


# -- a process of three steps -----------------------------------------------------------------------


def test_a_process_of_three_steps_ends_at_its_enumerated_optimum():
    """Two actions a step, a reward of the whole sequence: the best policy under KL is q exp(R / beta), by tokens."""
    beta, steps = 0.5, 3
    generator = torch.Generator().manual_seed(0)
    sequences = torch.cartesian_prod(*[torch.arange(2)] * steps)  # [8, 3]
    scores = torch.randn(8, generator=generator)
    # Logits by prefix: 1 + 2 + 4 states.
    digits = [sequences[:, :t] * 2 ** torch.arange(t).flip(0) for t in range(steps)]
    prefix = torch.stack([2**t - 1 + digits[t].sum(1) for t in range(steps)], 1)
    q_logits = torch.randn(7, 2, generator=generator)

    def logprobs(logits):
        return logits.log_softmax(-1)[prefix, sequences]

    q = logprobs(q_logits)
    logits = q_logits.clone().requires_grad_()
    values = torch.zeros(7, requires_grad=True)
    optimizer = torch.optim.Adam([logits, values], lr=0.02)
    mask = torch.ones(8, steps)
    for _ in range(800):
        old, old_values = logprobs(logits).detach(), values[prefix].detach()
        penalty = rlhf.divergences.reward_penalty("kl", old, q)
        rewards = rlhf.token_rewards(scores, penalty, mask, beta)
        A, returns = rlhf.gae(rewards, old_values, mask, 1.0, 0.95)
        weight = (
            old.sum(1).exp()[:, None] * 8
        )  # all sequences, each as often as the policy samples it
        for _ in range(2):
            loss = rlhf.policy_loss(logprobs(logits), old, A * weight, mask).loss
            fit = (weight * (values[prefix] - returns).square()).mean()
            optimizer.zero_grad()
            (loss + fit).backward()
            optimizer.step()
    best = (q.sum(1) + scores / beta).log_softmax(0).exp()
    torch.testing.assert_close(logprobs(logits).detach().sum(1).exp(), best, rtol=0, atol=0.01)


# -- errors ----------------------------------------------------------------------------------------

X, MASK = torch.zeros(2, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rlhf.policy_loss(X, X[:1], X, MASK), "old_logprobs: expected the shape of logprobs"),
        (lambda: rlhf.policy_loss(X, X, X, MASK[:, :1]), "mask: expected the shape of logprobs"),
        (lambda: rlhf.policy_loss(X, X, X, MASK, cliprange=0.0), "cliprange: expected a number > 0"),
        (lambda: rlhf.policy_loss(X, X, X, MASK * 0), "mask: expected it to keep a token"),
        (lambda: rlhf.value_loss(X, X, X[0], MASK), "returns: expected the shape of values"),
        (lambda: rlhf.ranking_loss(X[0], X[0]), r"scores: expected \[B, K\]"),
        (lambda: rlhf.ranking_loss(X, X[:1]), "ranks: expected the shape of scores"),
        (lambda: rlhf.ranking_loss(X, X), "ranks: expected a pair of different ranks"),
        (lambda: rlhf.ranking_loss(X, X + torch.nan), "ranks: expected finite numbers"),
    ],
)  # fmt: skip
def test_arguments_that_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
