"""``Experts4bit``: the experts of a mixture-of-experts model of transformers, their weights stacked in 4 bits.

transformers keeps the weights of all experts of a layer as 3-D parameters of one module (``gate_up_proj``,
``down_proj``), whose class says how gate, activation, bias and norm apply. Here each parameter becomes a
:class:`GroupedLinear4bit`, and everything else stays that class's own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from .adapter import AdapterSettings
from .formats import Weight4bit, quantize_4bit
from .frozen4bit import is_dtensor
from .grouped import grouped_linear_4bit, grouped_lora_linear_4bit
from .multi_lora.experts import multi_grouped
from .multi_lora.in_force import in_force
from .named_adapters import NamedAdapters
from .packed import Params4bit, plain

# What transformers' `use_experts_implementation` gives a class of experts, or its __init__.
_OF_TRANSFORMERS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")

# What accelerate's hook puts into a module, bound to it: no other module may have it.
_OF_ACCELERATE = ("forward", "_old_forward", "_hf_hook")


def stacked_parameters(module: nn.Module) -> tuple[str, ...]:
    """The parameters of a transformers' module of experts that hold their weights; () for any other module.

    Examples:
        >>> import torch
        >>> from lowrank_kernels.experts import stacked_parameters
        >>> stacked_parameters(torch.nn.Linear(8, 8))
        ()
    """
    if not all(hasattr(module, name) for name in _OF_TRANSFORMERS):
        return ()
    names = _projections(module)
    stacks = [module._parameters.get(name) for name in names]
    return names if all(stack is not None and stack.dim() == 3 for stack in stacks) else ()


def _projections(experts: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")


def stack_names(module: nn.Module) -> tuple[str, ...]:
    """As :func:`stacked_parameters`; also of an :class:`Experts4bit`, for which they are 4-bit ones."""
    return tuple(module.stacks) if isinstance(module, Experts4bit) else stacked_parameters(module)


def count_of_experts(module: nn.Module) -> int:
    """How many experts a module with :func:`stack_names` has."""
    if isinstance(module, Experts4bit):
        return next(iter(module.stacks.values())).num_experts
    return module._parameters[stacked_parameters(module)[0]].shape[0]


def lies_transposed(experts: nn.Module, w: Weight4bit) -> bool:
    """Whether a stack of these experts is ``[E, K, N]``. Those in MXFP4 never are, whatever their class says."""
    return experts.is_transposed and w.quant_type != "mxfp4"


def no_dropout(lora_dropout: float) -> str:
    return f"lora_dropout: expected 0 for adapters of experts, as PEFT has it for target_parameters, got {lora_dropout}"


class Factors(NamedTuple):
    """The adapter of every expert: A ``[E, r, K]``, B ``[E, N, r]`` and the scaling of all."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


def joined(factors: Sequence[Factors]) -> Factors:
    """Adapters that add up, as one of joined ranks."""
    if len(factors) == 1:
        return factors[0]
    A = torch.cat([of.A for of in factors], 1)
    return Factors(A, torch.cat([of.B * of.scaling for of in factors], 2), 1.0)


class GroupedLinear4bit(NamedAdapters):
    """``y[m] = W_e x[m] + bias_e``, and named adapters: the weights ``[E, N, K]`` of one projection of all experts.

    ``weight`` and its statistics are those of :class:`Linear4bit`. Adapter ``name`` is as PEFT's ``target_parameters``:
    ``lora_A[name].weight [r E, K]`` and ``lora_B[name].weight [N, r E]``, in which expert e has rows ``e r`` to
    ``(e + 1) r`` of A and the columns ``e, e + E, ...`` of B. There is no dropout. A ``transposed`` stack is
    ``[E, K, N]``, as GPT-OSS has it.

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> from lowrank_kernels.experts import GroupedLinear4bit
        >>> layer = GroupedLinear4bit.from_weight(lk.quantize_4bit(torch.randn(4, 32, 64)))
        >>> layer.add_adapter("default", r=8)
        >>> layer(torch.randn(5, 64), torch.tensor([2, 2, 4, 5], dtype=torch.int32)).shape
        torch.Size([5, 32])
    """

    @classmethod
    def from_weight(cls, w: Weight4bit, transposed: bool = False) -> GroupedLinear4bit:
        """A layer around the stack ``w``, whose tensors are shared.

        Raises TypeError for what is no Weight4bit, ValueError for one that is no stack.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> from lowrank_kernels.experts import GroupedLinear4bit
            >>> GroupedLinear4bit.from_weight(lk.quantize_4bit(torch.randn(4, 64, 32)), transposed=True).in_features
            64
        """
        if not isinstance(w, Weight4bit):
            raise TypeError(f"w: expected a Weight4bit (see quantize_4bit), got {type(w).__name__}")
        if len(w.shape) != 3:
            raise ValueError(f"w: expected a stack [E, N, K], got shape {tuple(w.shape)}")
        w.validate("w")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.transposed = transposed
        self._setup(w, None)
        return self

    def _setup(self, w: Weight4bit, bias: None) -> None:
        self.num_experts, rows, columns = w.shape
        N, K = (columns, rows) if self.transposed else (rows, columns)
        self.out_features, self.in_features = N, K
        self.lent: list[
            Factors
        ] = []  # adapters that belong to others, in force while they are here
        super()._setup(w, bias)

    def _add_adapter(self, name: str, settings: AdapterSettings) -> None:
        if settings.lora_dropout:
            raise ValueError(no_dropout(settings.lora_dropout))
        super()._add_adapter(name, settings)

    def factors_of(self, A: torch.Tensor, B: torch.Tensor, r: int, scaling: float) -> Factors:
        """The parameters A ``[r E, K]`` and B ``[N, r E]`` of an adapter as factors, which are views.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> from lowrank_kernels.experts import GroupedLinear4bit
            >>> layer = GroupedLinear4bit.from_weight(lk.quantize_4bit(torch.randn(4, 32, 64)))
            >>> layer.factors_of(torch.zeros(8, 64), torch.zeros(32, 8), 2, 1.0).B.shape
            torch.Size([4, 32, 2])
        """
        E = self._weight4bit.shape[0]
        a, b = A.reshape(E, r, A.shape[1]), B.reshape(B.shape[0], r, E)
        return Factors(a, b.permute(2, 0, 1), scaling)

    def factors(self, name: str) -> Factors:
        """A ``[E, r, K]``, B ``[E, N, r]`` and scaling of adapter ``name``: views of its parameters.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> from lowrank_kernels.experts import GroupedLinear4bit
            >>> layer = GroupedLinear4bit.from_weight(lk.quantize_4bit(torch.randn(4, 32, 64)))
            >>> layer.add_adapter("default", r=8)
            >>> layer.factors("default").A.shape, layer.factors("default").B.shape
            (torch.Size([4, 8, 64]), torch.Size([4, 32, 8]))
        """
        return self.factors_of(*self.adapter_parameters(name), self.r[name], self.scaling[name])

    def _fqn_modifiers(self) -> dict[str, str]:
        # In an Experts4bit the key "weight.quant_state.bitsandbytes__nf4" has no "weight".
        return super()._fqn_modifiers() | {"quant_state": "_entries"}

    def extra_repr(self) -> str:
        w = self._weight4bit
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"
            f"{super().extra_repr()}, transposed={self.transposed}, quant_type={w.quant_type}, "
            f"blocksize={w.blocksize}, double_quant={w.double_quant}, dtype={w.dtype}"
        )

    def _with_adapter(self, W: torch.Tensor, name: str) -> torch.Tensor:
        return self._with_factors(W, [self.factors(name)])

    def _with_factors(self, W: torch.Tensor, factors: Sequence[Factors]) -> torch.Tensor:
        for A, B, scaling in factors:
            for e in range(self.num_experts):  # one temporary of the size of an expert
                delta = B[e].float() @ A[e].float()
                W[e].add_(delta.T if self.transposed else delta, alpha=scaling)
        return W

    def merge_factors(self, factors: Sequence[Factors]) -> None:
        """Quantizes ``W + Σ scaling · B A`` with the same settings and runs on that; keeps the bytes of W aside."""
        self._merge_weight(lambda W: self._with_factors(W, factors))

    def unmerge_factors(self) -> None:
        """Restores the bytes before :meth:`merge_factors`."""
        self._unmerge_weight()

    def forward(
        self,
        x: torch.Tensor,
        offsets: torch.Tensor,
        bias: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
        num_tokens: int | None = None,
    ) -> torch.Tensor:
        """``[M, in_features] -> [M, out_features]``, x sorted by expert: see :func:`grouped_lora_linear_4bit`.

        ``tokens``: int64 ``[M]``, which of the batch's ``num_tokens`` tokens each row of x is of. A plan of an
        AdapterBank needs both.
        """
        w, name, factors = self.weight4bit, self._active_adapter, self.lent
        under = self.in_force(entries) if (entries := in_force.entries) else None
        if under is not None:
            if self._unmerged is not None:
                self._require_unmerged("forward under a plan")
            if tokens is None or num_tokens is None:
                raise ValueError(
                    "tokens, num_tokens: expected the token of each row and their number under a plan, got None"
                )
            plan, pages = under
            plan = plan.for_tokens(num_tokens)
            return multi_grouped(x, w, offsets, bias, self.transposed, tokens, plan, pages)
        if self._disabled and self._unmerged is not None:
            w = self._unmerged
        elif not self._disabled and self._unmerged is None and name in self.r:
            factors = [*factors, self.factors(name)]
        if not factors:
            return grouped_linear_4bit(x, w, offsets, bias, self.transposed)
        A, B, scaling = joined(factors)
        return grouped_lora_linear_4bit(x, w, offsets, A, B, scaling, bias, self.transposed)


class Experts4bit(nn.Module):
    """The experts of one layer of a model of transformers, in 4 bits: reads only those that tokens chose.

    Made of a module whose class transformers decorates with ``use_experts_implementation``, by :func:`replace_linear`
    or :meth:`from_experts`. The result is an instance of that class as well: gate, activation, biases and norm are
    its own, only the projections are :class:`GroupedLinear4bit`. Its state dict has the names of the 3-D parameters,
    with bitsandbytes' entries for each, as its ``replace_parameter_4bit`` writes them.

    Forward, of ``hidden_states [T, H]``, ``top_k_index [T, k]`` and ``top_k_weights [T, k]``:
    ``y[t] = Σ_j top_k_weights[t, j] · expert(top_k_index[t, j])(hidden_states[t])``. Indices of E and more (of experts
    that another process has) add nothing.

    Source: transformers' ``integrations/moe.py``.

    Examples:
        >>> import torch, transformers, lowrank_kernels as lk
        >>> from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
        >>> sizes = dict(hidden_size=64, moe_intermediate_size=64, num_experts=4)
        >>> dense = Qwen3MoeExperts(transformers.Qwen3MoeConfig(**sizes))
        >>> _ = [torch.nn.init.normal_(parameter) for parameter in dense.parameters()]
        >>> experts = lk.Experts4bit.from_experts(dense)
        >>> index, weights = torch.tensor([[0, 3], [3, 1]]), torch.full((2, 2), 0.5)
        >>> experts(torch.randn(2, 64), index, weights).shape
        torch.Size([2, 64])
    """

    family: type  # the class of transformers
    lists_stacks = 0  # above 0 while PEFT looks for the parameters that its config names

    def named_parameters(self, prefix="", recurse=True, remove_duplicate=True):
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        if self.lists_stacks and not recurse:
            start = f"{prefix}." if prefix else ""
            yield from ((start + name, stack.weight) for name, stack in self.stacks.items())

    @classmethod
    def from_experts(
        cls,
        experts: nn.Module,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        quant_storage: torch.dtype = torch.uint8,
    ) -> Experts4bit:
        """``experts`` with its weights quantized; everything else is shared with it.

        Raises TypeError if ``experts`` is no module of experts of transformers; ValueError for a NaN or infinity.

        Examples:
            >>> import torch, transformers, lowrank_kernels as lk
            >>> from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
            >>> sizes = dict(hidden_size=64, moe_intermediate_size=64, num_experts=4)
            >>> dense = Qwen3MoeExperts(transformers.Qwen3MoeConfig(**sizes))
            >>> _ = [torch.nn.init.normal_(parameter) for parameter in dense.parameters()]
            >>> experts = lk.Experts4bit.from_experts(dense)
            >>> list(experts.stacks)
            ['gate_up_proj', 'down_proj']
        """
        names = stacked_parameters(experts)
        if not names:
            raise TypeError(
                "experts: expected a module whose class has transformers' use_experts_implementation, got "
                f"{type(experts).__name__}"
            )
        quant = quant_type, blocksize, double_quant, quant_storage
        stacks = {name: quantize_4bit(experts._parameters[name], *quant) for name in names}
        return cls.from_weights(experts, stacks)

    @classmethod
    def from_weights(
        cls,
        experts: nn.Module,
        stacks: dict[str, Weight4bit],
        transposed: bool | None = None,
    ) -> Experts4bit:
        """``experts`` with these stacks for its 3-D parameters; ``transposed``: unless given, as its class says.

        Raises ValueError unless there is one for each projection.

        Examples:
            >>> import torch, transformers, lowrank_kernels as lk
            >>> from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
            >>> sizes = dict(hidden_size=64, moe_intermediate_size=64, num_experts=4)
            >>> dense = Qwen3MoeExperts(transformers.Qwen3MoeConfig(**sizes))
            >>> _ = [torch.nn.init.normal_(parameter) for parameter in dense.parameters()]
            >>> stacks = {name: lk.quantize_4bit(W, "int4") for name, W in dense.named_parameters()}
            >>> lk.Experts4bit.from_weights(dense, stacks).down_proj.weight4bit.quant_type
            'int4'
        """
        if stacks.keys() != set(_projections(experts)):
            raise ValueError(f"stacks: expected {_projections(experts)}, got {tuple(stacks)}")
        new = class_of(type(experts)).__new__(class_of(type(experts)))
        new.__dict__ = {k: v for k, v in experts.__dict__.items() if k not in _OF_ACCELERATE}
        for kind in ("_parameters", "_buffers", "_modules"):
            new.__dict__[kind] = experts.__dict__[kind].copy()
        for name, stack in stacks.items():
            new._parameters.pop(name, None)
            lies = lies_transposed(experts, stack) if transposed is None else transposed
            layer = GroupedLinear4bit.from_weight(stack, lies)
            new._modules[name] = layer.train(experts.training)
        return new

    @property
    def stacks(self) -> dict[str, GroupedLinear4bit]:
        """The projections by the names of the parameters that they stand for."""
        return {n: m for n, m in self._modules.items() if isinstance(m, GroupedLinear4bit)}

    def dequantized(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A module of the family's own class with dense weights, everything else shared with this one.

        Raises ValueError where a stack has adapters.

        Examples:
            >>> import torch, transformers, lowrank_kernels as lk
            >>> from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
            >>> sizes = dict(hidden_size=64, moe_intermediate_size=64, num_experts=4)
            >>> dense = Qwen3MoeExperts(transformers.Qwen3MoeConfig(**sizes))
            >>> _ = [torch.nn.init.normal_(parameter) for parameter in dense.parameters()]
            >>> experts = lk.Experts4bit.from_experts(dense)
            >>> type(experts.dequantized()).__name__
            'Qwen3MoeExperts'
        """
        family = self.family
        new = family.__new__(family)
        new.__dict__ = {k: v for k, v in self.__dict__.items() if k not in _OF_ACCELERATE}
        for kind in ("_parameters", "_buffers", "_modules"):
            new.__dict__[kind] = self.__dict__[kind].copy()
        for name, stack in self.stacks.items():
            if stack.r:
                raise ValueError(
                    f"dequantized: expected {name} without adapters, got {list(stack.r)}"
                )
            W = stack.dequantize(dtype)
            if stack.transposed != self.is_transposed:
                W = W.transpose(1, 2).contiguous()
            del new._modules[name]
            new._parameters[name] = nn.Parameter(W)
        return new

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)

    def __reduce_ex__(self, protocol):
        return (
            _blank,
            (self.family,),
            self.__dict__,
        )  # the class has no name to be found by

    # -- state dict: the child `down_proj` with the entries `weight`, `weight.absmax`, ... is the parameter `down_proj`
    # with `down_proj.absmax`, ...

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        found = super().state_dict(
            *args, destination=destination, prefix=prefix, keep_vars=keep_vars
        )
        for name in self.stacks:
            _rename(found, f"{prefix}{name}.weight", f"{prefix}{name}")
        return found

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, layer in self.stacks.items():
            key = prefix + name
            _cut_like(f"{key}.weight", key, state_dict)
            entries = [key, *(f"{key}.{suffix}" for suffix in _suffixes(layer))]
            for old in [
                k for k in state_dict if k in entries or k.startswith(f"{key}.quant_state.")
            ]:
                state_dict[f"{key}.weight{old[len(key) :]}"] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _cut_like(current: str, key: str, state_dict: dict) -> None:
    """Cuts the whole tensor ``key`` as the shard ``current``, which is of FSDP2.

    torch's set_model_state_dict cuts whole tensors by the names of parameters. For one that it does not know it
    leaves the whole tensor there, and adds the shard that the parameter is now.
    """
    shard, whole = state_dict.get(current), state_dict.get(key)
    if is_dtensor(shard) and isinstance(whole, torch.Tensor) and not is_dtensor(whole):
        from torch.distributed.tensor import distribute_tensor  # slow to import

        whole = plain(whole).detach()
        whole = whole if shard.is_meta else whole.to(shard.device)
        state_dict[key] = distribute_tensor(whole, shard.device_mesh, shard.placements)


def _suffixes(layer: GroupedLinear4bit) -> tuple[str, ...]:
    return tuple(name for name in layer._buffers)


def _rename(entries: dict, start: str, new: str) -> None:
    """The keys that are or begin with ``start`` (up to a dot) begin with ``new``; order and other keys stay."""
    renamed = [
        (new + key[len(start) :] if key == start or key.startswith(start + ".") else key, value)
        for key, value in entries.items()
    ]
    entries.clear()
    entries.update(renamed)


@functools.cache
def class_of(family: type) -> type:
    """The class of ``family``'s experts in 4 bits."""
    own = {
        "__doc__": Experts4bit.__doc__,
        "__module__": Experts4bit.__module__,
        "family": family,
    }
    return type(f"{family.__name__}4bit", (Experts4bit, family), own)


def _blank(family: type) -> Experts4bit:
    cls = class_of(family)
    return cls.__new__(cls)


def experts_forward(
    experts: Experts4bit,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The forward of :class:`Experts4bit`, in the order of steps of transformers' grouped_mm.

    Rows are sorted by expert once, stably, so that a row's place depends on the batch and its result does not.
    """
    top_k, E = top_k_index.shape[-1], next(iter(experts.stacks.values())).weight4bit.shape[0]
    chosen, order = torch.sort(top_k_index.reshape(-1), stable=True)
    offsets = torch.searchsorted(chosen, torch.arange(E, device=chosen.device), right=True).int()
    tokens = order // top_k
    x = hidden_states[tokens]

    def project(name: str, rows: torch.Tensor) -> torch.Tensor:
        bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
        return experts._modules[name](rows, offsets, bias, tokens, hidden_states.shape[0])

    if experts.has_gate:
        inner = experts._apply_gate(project("gate_up_proj", x))
    else:
        inner = experts.act_fn(project("up_proj", x))
    y = project("down_proj", inner)
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    y = y[back].view(*top_k_index.shape, y.shape[-1]).sum(1)
    return y.to(hidden_states.dtype)


__all__ = [
    "Experts4bit",
    "GroupedLinear4bit",
    "Params4bit",
    "experts_forward",
    "stacked_parameters",
]
