"""``RoleModel``: policy, reference, value and reward model as adapters of one 4-bit base.

One forward scores all four: its batch has the same sequences once for each role, and a plan of an
:class:`AdapterBank` gives each its adapter. Training is one backward through policy and value.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..adapter_files import write_adapter
from ..adapter_format import read_adapter
from ..arguments import ceil_div
from ..linear4bit import Linear4bit
from ..model_adapters import add_adapter, set_adapter
from ..named_adapters import adapted_layers
from ..nn import take_adapters
from ..paths import some
from .logprobs import logprobs, logprobs_of_two
from .role_parts import (
    ROLES,
    TRAINED,
    add_as_read,
    bank_of,
    check_model,
    head_of_language,
    one_kernel,
    scalar_head,
)

# Tokens of one forward on a CPU. With more of them a weight's share of the time does not fall any further, but
# activations become memory that the system hands out anew, page by page, in every layer.
_TOKENS = 512


class RoleModel(nn.Module):
    """Four roles on one base in 4 bits: ``policy`` and ``value`` train, ``reference`` and ``reward`` are frozen.

    Policy and reference give log-probabilities of tokens, value a number at each token and reward one for a sequence:
    ``head · h``, with h the last hidden state under the role's adapter.

    A token's log-probability has the same bits in :meth:`score` and :meth:`forward` while the policy is the same, so
    that the first ratio of PPO is exactly 1: the language model's head works on chunks of one size, and the layers on
    one kernel whatever the number of rows. This is so on CPUs; elsewhere a ratio of 1 is approximate.

    Args:
        model: a causal language model of transformers whose linear layers are in 4 bits (``replace_linear(model,
            r=0)``); its layers become :class:`LoRALinear4bit` in place. No dropout.
        r, lora_alpha, target_modules, target_parameters: of adapters that are made anew, see :func:`add_adapter`;
            lora_alpha None is 2 r.
        reference: a folder with the adapter that the policy starts from and is held near to; None: the base.
        reward: a folder with an adapter and its head, as TRL's ``RewardTrainer`` and PEFT's ``SEQ_CLS`` write; None:
            the base under a new random head, of standard deviation 1 / sqrt(D + 1).
        policy, value: folders that :meth:`save` wrote, to go on from. Otherwise the policy starts as the reference and
            the value as the reward's adapter under a head of zeros; each is a new adapter where there is none. Their
            lora_dropout becomes 0.
        temperature: logits of policy and reference are divided by it.

    Attributes:
        bank: the :class:`AdapterBank` of all roles.
        has_reward: whether there is a reward adapter.

    Raises:
        TypeError, ValueError: the model is no causal language model with 4-bit layers, has dropout, or computes its
            logits in a way that is not known here; a file is refused (see :func:`load_adapter`) or lacks a head.

    Examples:
        >>> import torch, transformers, lowrank_kernels as lk
        >>> from lowrank_kernels import rlhf
        >>> sizes = dict(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
        >>> heads = dict(num_attention_heads=2, num_key_value_heads=2)
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
        >>> report = lk.replace_linear(model, r=0, progress=False)
        >>> roles = rlhf.RoleModel(model, r=8)
        >>> ids = torch.randint(32, (3, 7))
        >>> {role: tuple(x.shape) for role, x in roles.score(ids, torch.ones_like(ids), rlhf.ROLES).items()}
        {'policy': (3, 6), 'reference': (3, 6), 'value': (3, 7), 'reward': (3,)}
    """

    def __init__(
        self,
        model: nn.Module,
        r: int = 16,
        lora_alpha: float | None = None,
        target_modules: str | Iterable[str] = "all-linear",
        target_parameters: str | Iterable[str] | None = None,
        reference: str | os.PathLike | None = None,
        reward: str | os.PathLike | None = None,
        policy: str | os.PathLike | None = None,
        value: str | os.PathLike | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        check_model(model)
        if not temperature > 0:
            raise ValueError(f"temperature: expected a number > 0, got {temperature!r}")
        for layer in model.modules():
            if isinstance(layer, Linear4bit):
                take_adapters(layer)
        layers = adapted_layers(model)
        sources = {"reference": reference, "reward": reward, "policy": policy, "value": value}
        folders = {role: folder for role, folder in sources.items() if folder is not None}
        files = {role: read_adapter(layers, folder, model) for role, folder in folders.items()}
        head = model.get_output_embeddings()
        width, device = head.in_features, head.weight.device
        self.model, self.temperature = model, temperature
        self.head_of_language = head_of_language(model)
        self.value_head = scalar_head(files.get("value"), folders.get("value"), width, device)
        self.reward_head = scalar_head(files.get("reward"), folders.get("reward"), width, device)
        if "value" not in files:
            nn.init.zeros_(self.value_head.weight)
        self.reward_head.requires_grad_(False)
        self.has_reward = "reward" in files
        for name, of in (("policy", "reference"), ("value", "reward")):
            if start := files.get(name) or files.get(of):
                add_as_read(layers, name, start)
            else:
                alpha = 2 * r if lora_alpha is None else lora_alpha
                targets = {"target_modules": target_modules, "target_parameters": target_parameters}
                add_adapter(model, name, r, alpha, **targets)
        frozen = (role for role in ("reference", "reward") if role in folders)
        self._frozen = {role: os.path.abspath(folders[role]) for role in frozen}
        self._adapters = {role: role if role in (*TRAINED, *files) else None for role in ROLES}
        model.requires_grad_(False)
        self.value_head.requires_grad_(True)
        set_adapter(model, "policy")
        self._make_bank()

    def _make_bank(self) -> None:
        for name in TRAINED if hasattr(self, "bank") else ():
            self.bank.evict(name)  # an adapter of the model's own lives in one bank
        self.bank = bank_of(self.model, self._frozen)
        self.bank.trainable(*TRAINED)

    def _apply(self, *args, **kwargs):
        """As of every module; on another device the pages are made anew, for which frozen adapters are read again."""
        super()._apply(*args, **kwargs)
        if self.value_head.weight.device != self.bank.device:
            self._make_bank()
        return self

    # -- forward -----------------------------------------------------------------------------------

    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        roles: Sequence[str] = TRAINED,
        where: torch.Tensor | None = None,
        entropy: bool = False,
        divergence: str | None = None,
        texts: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """What :meth:`score` returns, with gradients of policy and value: one forward, and one backward for both.

        Args:
            ids, mask, roles, where, divergence: see :meth:`score`.
            entropy: whether "entropy" ``[B, S - 1]`` of the policy, in nats, comes too.
            texts: ids and mask of other sequences, of which the policy's log-probabilities come as "texts".

        Examples:
            >>> import torch, transformers, lowrank_kernels as lk
            >>> from lowrank_kernels import rlhf
            >>> sizes = dict(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
            >>> heads = dict(num_attention_heads=2, num_key_value_heads=2)
            >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
            >>> report = lk.replace_linear(model, r=0, progress=False)
            >>> roles, ids = rlhf.RoleModel(model, r=8), torch.randint(32, (3, 7))
            >>> out = roles(ids, torch.ones_like(ids))
            >>> (out["policy"].mean() + out["value"].square().mean()).backward()
        """
        keep = _check_batch(ids, mask, roles)
        wanted = keep[:, 1:] & keep[:, :-1]
        if where is not None:
            if where.shape != wanted.shape or where.dtype != torch.bool:
                raise ValueError(
                    f"where: expected booleans {list(wanted.shape)}, got {where.dtype} {list(where.shape)}"
                )
            wanted = wanted & where
        groups = [(role, ids, keep) for role in roles]
        if texts is not None:
            groups.append(("policy", texts[0], _check_batch(*texts, roles)))
        hidden = self._hidden(groups)
        of_role = dict(zip(roles, hidden))
        out = self._of_tokens(of_role, ids, wanted, entropy, divergence)
        for role in roles:
            if role == "value":
                out[role] = _scalar(self.value_head, of_role[role])
            elif role == "reward":
                last = ids.shape[1] - 1 - keep.flip(1).int().argmax(1)
                at = of_role[role][torch.arange(len(ids), device=ids.device), last]
                out[role] = _scalar(self.reward_head, at)
        if texts is not None:
            _, text_ids, text_keep = groups[-1]
            wanted = text_keep[:, 1:] & text_keep[:, :-1]
            out |= {"texts": self._of_tokens({"policy": hidden[-1]}, text_ids, wanted)["policy"]}
        return {role: out[role] for role in (*roles, *out)}

    @torch.no_grad()
    def score(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        roles: Sequence[str] = ROLES,
        where: torch.Tensor | None = None,
        divergence: str | None = None,
    ) -> dict[str, torch.Tensor]:
        """What each role says of the same sequences, from one forward without gradients.

        Args:
            ids: ``[B, S]``, integers below the vocabulary's size.
            mask: ``[B, S]``, 1 or true for tokens, 0 for padding, on either side.
            roles: some of "policy", "reference", "value", "reward".
            where: booleans ``[B, S - 1]``: whose log-probabilities are wanted, token s + 1 at s; None: of all.
            divergence: of :data:`rlhf.divergences.NAMES`: the exact divergence of the policy from the reference at each
                token, which both have to be among ``roles``, comes as "divergence" ``[B, S - 1]``.

        Returns:
            By role, float32: "policy" and "reference" ``[B, S - 1]``, the log-probability of ``ids[:, 1:]`` at
            ``temperature``, 0 at padding and at the first token; "value" ``[B, S]``; "reward" ``[B]``, the score at the
            last token that the mask keeps.

        Raises ValueError, TypeError naming the argument: other shapes, a row without a token, an unknown role.

        Examples:
            >>> import torch, transformers, lowrank_kernels as lk
            >>> from lowrank_kernels import rlhf
            >>> sizes = dict(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
            >>> heads = dict(num_attention_heads=2, num_key_value_heads=2)
            >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
            >>> report = lk.replace_linear(model, r=0, progress=False)
            >>> roles, ids = rlhf.RoleModel(model, r=8), torch.randint(32, (3, 7))
            >>> out = roles.score(ids, torch.ones_like(ids), ["policy", "reference"])
            >>> torch.equal(out["policy"], out["reference"])  # a new policy is the base
            True
        """
        return self(ids, mask, roles, where, divergence=divergence)

    def _hidden(self, groups: list[tuple[str, torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
        """The last hidden states ``[B, S, D]`` of each group of role, ids and mask, some sequences of all at a time."""
        tokens = sum(ids.numel() for _, ids, _ in groups)
        on_cpu = groups[0][1].device.type == "cpu"
        count = (
            min(ceil_div(tokens, _TOKENS), max(len(ids) for _, ids, _ in groups)) if on_cpu else 1
        )
        split = [
            [(role, *of) for of in zip(ids.tensor_split(count), keep.tensor_split(count))]
            for role, ids, keep in groups
        ]
        return [torch.cat(parts) for parts in zip(*map(self._hidden_at_once, zip(*split)))]

    def _hidden_at_once(
        self, groups: Sequence[tuple[str, torch.Tensor, torch.Tensor]]
    ) -> list[torch.Tensor]:
        """The same from one forward.

        transformers takes its attention without a mask where no sequence has padding, and the bits are others then. So
        on CPUs a sequence of one token goes with those that have none.
        """
        columns = max(ids.shape[1] for _, ids, _ in groups)
        names = [self._adapters[role] for role, ids, _ in groups for _ in ids]

        def joined(parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat([F.pad(part, (0, columns - part.shape[1])) for part in parts])

        ids = joined([ids for _, ids, _ in groups])
        keep = joined([keep for _, _, keep in groups])
        if ids.device.type == "cpu" and bool(keep.all()):
            ids = torch.cat([ids, ids[:1]])
            keep = torch.cat([keep, torch.arange(columns)[None] < 1])
            names.append(None)
        positions = (keep.cumsum(1) - 1).clamp(min=0)
        plan = self.bank.plan(names, tokens_per_sequence=[columns] * len(names))
        with self.bank.using(plan), one_kernel(ids.device):
            hidden = self.model.base_model(
                input_ids=ids, attention_mask=keep.long(), position_ids=positions, use_cache=False
            ).last_hidden_state
        sizes = [len(ids) for _, ids, _ in groups]
        parts = hidden[: sum(sizes)].split(sizes)
        return [part[:, : ids.shape[1]] for part, (_, ids, _) in zip(parts, groups)]

    def _of_tokens(
        self,
        hidden: dict[str, torch.Tensor],
        ids: torch.Tensor,
        wanted: torch.Tensor,
        entropy: bool = False,
        divergence: str | None = None,
    ) -> dict[str, torch.Tensor]:
        """Log-probabilities of policy and reference where they are wanted, and what goes with them."""
        roles = [role for role in ("policy", "reference") if role in hidden]
        at = {role: hidden[role][:, :-1][wanted] for role in roles}
        out: dict[str, torch.Tensor] = {}

        def spread(numbers: torch.Tensor) -> torch.Tensor:
            return numbers.new_zeros(wanted.shape).masked_scatter(wanted, numbers)

        if divergence is not None and len(roles) < 2:
            raise ValueError(
                f"divergence: expected policy and reference among roles, got {list(hidden)}"
            )
        arguments = self.head_of_language, ids[:, 1:][wanted], self.temperature
        if divergence is None:
            found = {
                role: logprobs(at[role], *arguments, entropy and role == "policy") for role in roles
            }
        else:
            both = at["policy"], at["reference"]
            of_roles, apart = logprobs_of_two(divergence, *both, *arguments, entropy)
            found = dict(zip(("policy", "reference"), of_roles))
            out["divergence"] = spread(apart)
        for role, of in found.items():
            out[role] = spread(of.logprobs)
        if entropy and "policy" in found:
            out["entropy"] = spread(found["policy"].entropy)
        return out

    @property
    def config(self):
        """The configuration of the language model."""
        return self.model.config

    def activation_checkpointing_enable(self, **arguments) -> None:
        """As of the model: activations are computed again in backward, under the plan of the forward.

        Examples:
            >>> import torch, transformers, lowrank_kernels as lk
            >>> from lowrank_kernels import rlhf
            >>> sizes = dict(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
            >>> heads = dict(num_attention_heads=2, num_key_value_heads=2)
            >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
            >>> report = lk.replace_linear(model, r=0, progress=False)
            >>> rlhf.RoleModel(model, r=8).activation_checkpointing_enable()
        """
        before = (
            self.model.gradient_checkpointing_enable
        )  # its name in older versions of transformers
        getattr(self.model, "activation_checkpointing_enable", before)(**arguments)

    def gradient_checkpointing_enable(self, **arguments) -> None:
        """The name that :meth:`activation_checkpointing_enable` had before.

        Examples:
            >>> import torch, transformers, lowrank_kernels as lk
            >>> from lowrank_kernels import rlhf
            >>> sizes = dict(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
            >>> heads = dict(num_attention_heads=2, num_key_value_heads=2)
            >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
            >>> report = lk.replace_linear(model, r=0, progress=False)
            >>> rlhf.RoleModel(model, r=8).gradient_checkpointing_enable()
        """
        self.model.gradient_checkpointing_enable(**arguments)

    @torch.no_grad()
    def generate(self, ids: torch.Tensor, mask: torch.Tensor, **arguments) -> torch.Tensor:
        """``model.generate`` of the policy: ``[B, P + T]``, prompt and continuation. ``arguments`` are transformers'.

        Examples:
            >>> import torch, transformers, lowrank_kernels as lk
            >>> from lowrank_kernels import rlhf
            >>> sizes = dict(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
            >>> heads = dict(num_attention_heads=2, num_key_value_heads=2)
            >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
            >>> report = lk.replace_linear(model, r=0, progress=False)
            >>> roles, ids = rlhf.RoleModel(model, r=8), torch.randint(3, 32, (3, 7))
            >>> roles.generate(ids, torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4).shape
            torch.Size([3, 11])
        """
        training = self.model.training
        self.model.eval()
        try:
            return self.model.generate(input_ids=ids, attention_mask=mask, **arguments)
        finally:
            self.model.train(training)

    # -- files -------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Writes the folders ``policy`` and ``value`` into ``path``, in PEFT's format, for :func:`load_adapter` too.

        The value's head is the ``score`` of a model for sequence classification with one label.

        Examples:
            >>> import torch, transformers, lowrank_kernels as lk
            >>> from lowrank_kernels import rlhf
            >>> sizes = dict(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
            >>> heads = dict(num_attention_heads=2, num_key_value_heads=2)
            >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
            >>> report = lk.replace_linear(model, r=0, progress=False)
            >>> rlhf.RoleModel(model, r=8).save("out")
            >>> import os
            >>> sorted(os.listdir("out"))
            ['policy', 'value']
        """
        for name, heads in (("policy", {}), ("value", {"score": self.value_head})):
            write_adapter(
                self.model,
                Path(path) / name,
                name,
                lambda layer, name=name: layer.whole_adapter(name),
                heads,
                warn=False,
            )

    @torch.no_grad()
    def load(self, path: str | os.PathLike) -> None:
        """Takes the values of what :meth:`save` wrote; parameters stay the same objects.

        Raises FileNotFoundError, ValueError as :func:`load_adapter`, also where the files cover other layers or have
        other ranks.

        Examples:
            >>> import torch, transformers, lowrank_kernels as lk
            >>> from lowrank_kernels import rlhf
            >>> sizes = dict(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
            >>> heads = dict(num_attention_heads=2, num_key_value_heads=2)
            >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
            >>> report = lk.replace_linear(model, r=0, progress=False)
            >>> roles = rlhf.RoleModel(model, r=8)
            >>> roles.save("out")
            >>> roles.load("out")
        """
        layers = adapted_layers(self.model)
        files = {name: read_adapter(layers, Path(path) / name, self.model) for name in TRAINED}
        for name, file in files.items():
            own = {p: layer.r[name] for p, layer in layers.items() if name in layer.r}
            found = {p: adapter.r for p, adapter in file.layers.items()}
            if own != found:
                raise ValueError(
                    f"path: {Path(path) / name}: expected the layers and ranks of this model's adapter {name!r}, "
                    f"got others: {some([p for p in {**own, **found} if own.get(p) != found.get(p)])}"
                )
        width = self.value_head.in_features
        head = scalar_head(
            files["value"], Path(path) / "value", width, self.value_head.weight.device
        )
        for name, file in files.items():
            for layer_path, adapter in file.layers.items():
                parameters = layers[layer_path].adapter_parameters(name)
                for parameter, values in zip(parameters, (adapter.A, adapter.B), strict=True):
                    parameter.copy_(values)
        self.value_head.weight.copy_(head.weight)


# -- forward ---------------------------------------------------------------------------------------


def _check_batch(ids: torch.Tensor, mask: torch.Tensor, roles: Sequence[str]) -> torch.Tensor:
    """The mask as booleans."""
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32) or 0 in ids.shape:
        raise ValueError(f"ids: expected integers [B, S], got {ids.dtype} {list(ids.shape)}")
    if mask.shape != ids.shape:
        raise ValueError(f"mask: expected {list(ids.shape)} as ids, got {list(mask.shape)}")
    if isinstance(roles, str) or not roles or len(set(roles)) < len(roles):
        raise ValueError(f"roles: expected some of {', '.join(ROLES)}, each once, got {roles!r}")
    if unknown := [role for role in roles if role not in ROLES]:
        raise ValueError(f"roles: expected some of {', '.join(ROLES)}, got {unknown[0]!r}")
    keep = mask != 0
    if not bool(keep.any(1).all()):
        raise ValueError("mask: expected a token in every row, got one without any")
    return keep


def _scalar(head: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """``head(hidden)`` row by row, so that a row's bits do not depend on how many there are."""
    return (hidden.float() * head.weight[0]).sum(-1)
