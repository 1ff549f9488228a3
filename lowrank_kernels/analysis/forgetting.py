"""How well base and adapters predict texts that nobody trained on, all in one forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from tabulate import tabulate
from torch import nn

from ..adapter_bank import AdapterBank
from ..arguments import ceil_div
from ..experts import GroupedLinear4bit
from ..model_adapters import adapters
from ..nn import lora_layers
from ..ragged import padded
from ..rlhf.logprobs import logprobs


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Means over tokens, in nats: negative log-likelihood ``nll``, and ``entropy`` of what was predicted.

    Examples:
        >>> from lowrank_kernels import analysis
        >>> round(analysis.Likelihood(nll=2.0, entropy=1.0).perplexity, 2)  # exp(nll)
        7.39
    """

    nll: float
    entropy: float

    @property
    def perplexity(self) -> float:
        """``exp(nll)``."""
        return float(torch.tensor(self.nll).exp())


class Forgetting(Mapping):
    """:class:`Likelihood` by name, ``"base"`` first, as :func:`forgetting` returns it; printed, a table.

    ``tokens``: how many were predicted.

    Examples:
        >>> from lowrank_kernels.analysis import Forgetting, Likelihood
        >>> print(Forgetting({"base": Likelihood(2.0, 1.0), "sft": Likelihood(2.5, 1.0)}, tokens=100))
                nll    over base    perplexity    entropy
        ----  -----  -----------  ------------  ---------
        base    2            0            7.39          1
        sft     2.5          0.5         12.18          1
        100 tokens
    """

    def __init__(self, rows: dict[str, Likelihood], tokens: int) -> None:
        self._rows, self.tokens = rows, tokens

    def __getitem__(self, name: str) -> Likelihood:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def forgotten(self, name: str) -> float:
        """How much more surprised the adapter is than the base: the difference of their ``nll``.

        Examples:
            >>> from lowrank_kernels.analysis import Forgetting, Likelihood
            >>> rows = {"base": Likelihood(2.0, 1.0), "sft": Likelihood(2.5, 1.0)}
            >>> Forgetting(rows, tokens=100).forgotten("sft")
            0.5
        """
        return self[name].nll - self["base"].nll

    def __repr__(self) -> str:
        rows = [
            [name, f"{row.nll:.4f}", f"{self.forgotten(name):+.4f}", f"{row.perplexity:.2f}", f"{row.entropy:.4f}"]
            for name, row in self.items()
        ]  # fmt: skip
        table = tabulate(rows, ["", "nll", "over base", "perplexity", "entropy"])
        return f"{table}\n{self.tokens} tokens"


@torch.no_grad()
def forgetting(
    model: nn.Module,
    texts: Sequence[str] | Sequence[Sequence[int]],
    names: Sequence[str],
    tokenizer=None,
    max_length: int = 512,
    batch_size: int = 8,
) -> Forgetting:
    """Negative log-likelihood and entropy of held-out ``texts`` under the base and under each adapter.

    Every text goes through the model once for the base and once for each adapter, in one batch under a plan of an
    :class:`AdapterBank`, so that a weight is read once for all. Means are over the tokens of all texts, the first of
    each excepted.

    Args:
        model: a causal language model with :class:`LoRALinear4bit`.
        texts: texts, or their token ids.
        names: adapters of the model.
        tokenizer: of transformers, for texts.
        max_length: texts are cut to so many tokens.
        batch_size: texts of one forward.

    Returns:
        :class:`Forgetting`.

    Raises ValueError, TypeError naming the argument: no text of two tokens, unknown adapters, adapters of experts.

    Source: Biderman et al., arXiv 2405.09673, measure forgetting on tasks; held-out likelihood needs none.

    Examples:
        >>> import torch, transformers, lowrank_kernels as lk
        >>> sizes = dict(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
        >>> heads = dict(num_attention_heads=2, num_key_value_heads=2)
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
        >>> report = lk.replace_linear(model, r=8, progress=False)
        >>> seen = lk.analysis.forgetting(model, [[5, 6, 7, 8], [9, 10, 11]], ["default"])
        >>> seen.forgotten("default"), seen.tokens  # a new adapter has forgotten nothing
        (0.0, 5)
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"names: expected a list of the model's adapters, got {names!r}")
    sequences = _token_ids(texts, tokenizer, max_length)
    bank = _bank(model, names)
    columns: list[str | None] = [None, *names]
    nll, entropy = torch.zeros(2, len(columns), dtype=torch.float64)
    head, training = model.get_output_embeddings(), model.training
    device = head.weight.device
    model.eval()
    try:
        for start in range(0, len(sequences), batch_size):
            rows = sequences[start : start + batch_size]
            ids, mask = (t.to(device) for t in padded(rows))
            longest = ids.shape[1]
            names_of_rows = [name for name in columns for _ in rows]
            plan = bank.plan(names_of_rows, tokens_per_sequence=[longest] * len(names_of_rows))
            with bank.using(plan):
                hidden = model.base_model(
                    input_ids=ids.repeat(len(columns), 1),
                    attention_mask=mask.repeat(len(columns), 1).long(),
                    use_cache=False,
                ).last_hidden_state
            for column, part in enumerate(hidden.split(len(rows))):
                of = logprobs(
                    part[:, :-1][mask[:, 1:]], head, ids[:, 1:][mask[:, 1:]], entropy=True
                )
                nll[column] -= of.logprobs.double().sum().cpu()
                entropy[column] += of.entropy.double().sum().cpu()
    finally:
        model.train(training)
    tokens = sum(len(row) - 1 for row in sequences)
    means = zip(columns, (nll / tokens).tolist(), (entropy / tokens).tolist())
    return Forgetting({name or "base": Likelihood(a, b) for name, a, b in means}, tokens)


def distinct(sequences: Sequence[Sequence[int]], n: int = 2) -> float:
    """How many of all n-grams of ``sequences`` differ: 1 where none comes twice; 0 where there are none.

    Raises ValueError for n < 1.

    Source: Li et al., arXiv 1510.03055.

    Examples:
        >>> from lowrank_kernels import analysis
        >>> analysis.distinct([[1, 2, 3], [1, 2, 4]])
        0.75
    """
    if type(n) is not int or n < 1:
        raise ValueError(f"n: expected an integer >= 1, got {n!r}")
    grams = [tuple(s[i : i + n]) for s in map(list, sequences) for i in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _token_ids(texts, tokenizer, max_length: int) -> list[torch.Tensor]:
    if isinstance(texts, str) or not hasattr(texts, "__iter__"):
        raise TypeError(
            f"texts: expected a list of texts or of token ids, got {type(texts).__name__}"
        )
    sequences = []
    for text in texts:
        if isinstance(text, str):
            if tokenizer is None:
                raise ValueError(
                    "tokenizer: expected one for texts that are no token ids, got None"
                )
            text = tokenizer(text)["input_ids"]
        sequences.append(torch.as_tensor(text, dtype=torch.long)[:max_length])
    if not (sequences := [row for row in sequences if len(row) > 1]):
        raise ValueError("texts: expected one of two tokens at least, got none")
    return sequences


def _bank(model: nn.Module, names: Sequence[str]) -> AdapterBank:
    """A bank with copies of the adapters, wherever their parameters live."""
    known = adapters(model)
    if missing := [name for name in names if name not in known]:
        raise ValueError(
            f"names: expected adapters of the model, {sorted(known)}, got {missing[0]!r}"
        )
    layers = lora_layers(model)
    for name in names:
        stacks = [p for p, l in known[name].layers.items() if isinstance(l, GroupedLinear4bit)]
        if stacks:
            raise ValueError(
                f"names: expected adapters of linear layers, got {name!r}, which {stacks[0]} has"
            )
    ranks = [max(layer.r[name] for layer in known[name].layers.values()) for name in names]
    bank = AdapterBank(layers, sum(ceil_div(rank, 8) for rank in ranks))
    for name in names:
        tensors = {}
        for path, layer in known[name].layers.items():
            A, B = layer.whole_adapter(name)
            tensors[f"{path}.lora_A.weight"] = A.detach()
            tensors[f"{path}.lora_B.weight"] = B.detach() * layer.scaling[name]
        bank.load(name, tensors)  # of scaling 1
    return bank
