"""Log-probabilities in chunks: the same as at once, with gradients, and the same bits in every batch."""

import pytest
import torch

from lowrank_kernels import rlhf

D, V = 32, 101


def head(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(D, V, bias=False, dtype=dtype)


def rows(count, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, D, generator=generator).to(dtype), torch.randint(
        V, (count,), generator=generator
    )


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 130])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_are_what_all_rows_at_once_are(count, temperature):
    of, (hidden, ids) = head(), rows(count)
    out = rlhf.logprobs(hidden, of, ids, temperature, entropy=True)
    logp = (of(hidden).double() / temperature).log_softmax(-1)
    torch.testing.assert_close(
        out.logprobs.double(), logp.gather(1, ids[:, None])[:, 0], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        out.entropy.double(), -(logp.exp() * logp).sum(1), rtol=1e-5, atol=1e-5
    )


def test_gradients_are_those_of_all_rows_at_once():
    of, (hidden, ids) = head(), rows(130)
    hidden.requires_grad_()
    weight = torch.randn(130)
    out = rlhf.logprobs(hidden, of, ids, entropy=True)
    gradients = torch.autograd.grad(
        (weight * (out.logprobs + out.entropy)).sum(), [hidden, of.weight]
    )
    logp = of(hidden).log_softmax(-1)
    whole = logp.gather(1, ids[:, None])[:, 0] - (logp.exp() * logp).sum(1)
    expected = torch.autograd.grad((weight * whole).sum(), [hidden, of.weight])
    for gradient, reference in zip(gradients, expected):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_among_others_and_with_gradients(dtype):
    of, (hidden, ids) = head(dtype), rows(130, dtype)
    whole = rlhf.logprobs(hidden, of, ids).logprobs.detach()
    for part in (slice(0, 1), slice(5, 12), slice(60, 130)):
        with torch.no_grad():
            assert torch.equal(rlhf.logprobs(hidden[part], of, ids[part]).logprobs, whole[part])
        grad = rlhf.logprobs(hidden[part].clone().requires_grad_(), of, ids[part]).logprobs
        assert torch.equal(grad.detach(), whole[part])


def test_never_more_than_a_chunk_of_logits():
    sizes, of = [], head()

    def counted(x):
        sizes.append(len(x))
        return of(x)

    hidden, ids = rows(130)
    rlhf.logprobs(hidden.requires_grad_(), counted, ids, chunk=50).logprobs.sum().backward()
    assert set(sizes) == {50} and len(sizes) == 6  # three chunks, each again in backward


def test_entropy_of_impossible_tokens():
    def masked(x):
        logits = torch.zeros(len(x), 4)
        logits[:, 2:] = -torch.inf
        return logits

    out = rlhf.logprobs(torch.zeros(3, D), masked, torch.tensor([0, 1, 2]), entropy=True)
    torch.testing.assert_close(out.entropy, torch.full((3,), 2.0).log())
    assert out.logprobs[2] == -torch.inf


@pytest.mark.parametrize("name", rlhf.divergences.NAMES)
def test_divergence_of_hidden_states_is_that_of_their_logits(name):
    of, (p, _), (q, _) = head(), rows(70), rows(70, seed=2)
    expected = rlhf.divergences.exact(name, of(p) / 2, of(q) / 2)
    out = rlhf.divergence_of(name, p, q, of, temperature=2.0)
    assert not out.requires_grad
    torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h, i: rlhf.logprobs(h[None], head(), i), r"hidden: expected \[rows, D\]"),
        (lambda h, i: rlhf.logprobs(h, head(), i[:2]), r"ids: expected \[3\]"),
        (lambda h, i: rlhf.logprobs(h, head(), i, temperature=0.0), "temperature: expected a number > 0"),
        (lambda h, i: rlhf.logprobs(h, head(), i, chunk=0), "chunk: expected an integer >= 1"),
        (lambda h, i: rlhf.divergence_of("kl", h, h[:2], head()), "hidden_p, hidden_q: expected"),
    ],
)  # fmt: skip
def test_arguments_that_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*rows(3))
