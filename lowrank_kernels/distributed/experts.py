"""The experts of a layer among processes: whole experts each, or of every expert a slice; see docs/distributed.md.

Every process has the same tokens and computes what its part adds to them; the sum over processes is the output:

* whole experts: ``y = Σ_p Σ_{j: expert t_j is here} weight[t, j] · expert(x[t])``;
* slices: ``y = Σ_p Σ_j weight[t, j] · down_p(gate(up_p(x[t])))``, gate and up by outputs, down by inputs.

Inputs and routing weights are the same on all processes, so their gradients are sums over them as well.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import nn
from torch.func import functional_call

from ..experts import Experts4bit, class_of, experts_forward
from .shards import Cut, Place, SumGradients, SumOverProcesses
from .stacks import (
    ConcatenatedOutputsOfStack,
    ExpertsOfStack,
    InputsOfStack,
    InterleavedOutputsOfStack,
    OutputsOfStack,
    PartOfStack,
)


class ParallelExperts4bit(Experts4bit):
    """What the two kinds have in common.

    ``stacks`` and the state dict hold this process's part, and ``cut`` says which experts or features that is.
    Adapters are added, chosen, deleted, disabled and loaded as in one process, each call on all processes.
    """

    place: Place
    cut: Cut

    def _become_part(self, place: Place, cut: Cut, kinds: dict[str, type[PartOfStack]]) -> None:
        """Called once, on a whole module whose class was changed to this one."""
        self.place, self.cut = place, cut
        for name, stack in self.stacks.items():
            stack.__class__ = kinds[name]
            stack._become_part(place, cut)

    def _keep_bias(self, name: str, rows: torch.Tensor, dim: int) -> None:
        old = self._parameters[f"{name}_bias"]
        part = old.detach().index_select(dim, rows.to(old.device))
        self._parameters[f"{name}_bias"] = nn.Parameter(part, requires_grad=old.requires_grad)

    def parts(self) -> Iterator[nn.Parameter]:
        """The parameters of which other processes have other parts."""
        for stack in self.stacks.values():
            yield from stack.parts()
        yield from (self._parameters[name] for name in self.cut_biases if name in self._parameters)

    def dequantized(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Not implemented for parts of experts: raises RuntimeError. Call it before ``parallelize``."""
        raise RuntimeError(
            "dequantized: not implemented for parallel experts; call it before parallelize"
        )

    def __reduce_ex__(self, protocol):
        return _blank, (self.kind, self.family), self.__dict__

    def extra_repr(self) -> str:
        part = f"{self.cut.first}:{self.cut.first + self.cut.size}"
        return f"{self._kind}={part} ({self.place.rank} of {self.place.size})"


class DividedExperts4bit(ParallelExperts4bit):
    """The experts ``cut`` of a layer, whole; the tokens of others add nothing here. Formulas: :mod:`.experts`."""

    _kind = "experts"
    cut_biases = ("gate_up_proj_bias", "up_proj_bias", "down_proj_bias")

    def _become_shard(self, place: Place, cut: Cut) -> None:
        self._become_part(place, cut, dict.fromkeys(self.stacks, ExpertsOfStack))
        if self.has_bias:
            for name in self.stacks:
                self._keep_bias(name, torch.arange(cut.first, cut.first + cut.size), 0)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        first, size = self.cut.first, self.cut.size
        index = top_k_index - first
        elsewhere = (index < 0) | (index >= size)
        weights = SumGradients.apply(top_k_weights, self.place).masked_fill(elsewhere, 0.0)
        x = SumGradients.apply(hidden_states, self.place)
        y = experts_forward(self, x, index.masked_fill(elsewhere, size), weights)
        return SumOverProcesses.apply(y, self.place)

    def post_expert_norm(self, y: torch.Tensor) -> torch.Tensor:
        """The norm of the class, which all processes have, of the rows of this one's experts."""
        norm = self._modules["post_expert_norm"]
        parameters = {
            name: SumGradients.apply(parameter, self.place)
            for name, parameter in norm.named_parameters()
        }
        return functional_call(norm, parameters, (y,))


class SlicedExperts4bit(ParallelExperts4bit):
    """The features ``cut`` between the projections of every expert of a layer. Formulas: :mod:`.experts`."""

    _kind = "features"
    cut_biases = ("gate_up_proj_bias", "up_proj_bias")

    def _become_shard(self, place: Place, cut: Cut) -> None:
        kind = kind_of_outputs(self)
        first, down = self.stacks
        self._become_part(place, cut, {first: kind, down: InputsOfStack})
        self.stacks[down].sums_rows = self.has_post_expert_norm
        if self.has_bias:
            self._keep_bias(first, kind.rows(cut), 1)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        x = SumGradients.apply(hidden_states, self.place)
        if self.has_post_expert_norm:  # all processes have the rows before the norm
            return experts_forward(self, x, top_k_index, top_k_weights)
        weights = SumGradients.apply(top_k_weights, self.place)
        y = experts_forward(self, x, top_k_index, weights)
        return SumOverProcesses.apply(y, self.place)


_PROBED = 8  # features, of which the first and the second half are two parts


def kind_of_outputs(experts: Experts4bit) -> type[OutputsOfStack]:
    """How gate and up lie among the outputs of the first projection: by what the class's own gate does with parts.

    Raises ValueError where parts of the outputs do not make parts of what comes behind the gate.
    """
    if not experts.has_gate:
        return OutputsOfStack
    stack = experts.stacks["gate_up_proj"]
    if stack.weight.is_meta:
        concatenated = getattr(experts, "is_concatenated", True)
        return ConcatenatedOutputsOfStack if concatenated else InterleavedOutputsOfStack
    cut = Cut([_PROBED // 2] * 2, 1)
    values = torch.linspace(-2.0, 3.0, 3 * 2 * _PROBED, device=stack.weight.device)
    values = values.sin().view(3, 2 * _PROBED)
    with torch.no_grad():
        expected = cut.own(experts._apply_gate(values), 1)
        for kind in (ConcatenatedOutputsOfStack, InterleavedOutputsOfStack):
            part = experts._apply_gate(values[:, kind.rows(cut).to(values.device)])
            if part.shape == expected.shape and torch.allclose(part, expected):
                return kind
    raise ValueError(
        f"slices: expected experts whose gate takes each feature by itself, got {experts.family.__name__}; use "
        "'experts'"
    )


def rehearse(experts: Experts4bit, place: Place, unit: int | None) -> Cut:
    """The cut of whole experts (no unit) or of features. Raises what would come in the middle of the work."""
    E = next(iter(experts.stacks.values())).num_experts
    if unit is None:
        if place.size > E:
            raise ValueError(
                f"experts: expected at least {place.size} experts, one for each process, got {E}"
            )
        cut, kinds = place.cut_evenly(E), [ExpertsOfStack] * 2
    else:
        cut = place.cut([*experts.stacks.values()][1].in_features, unit)
        kinds = [kind_of_outputs(experts), InputsOfStack]
    for rank in range(place.size):
        for stack, kind in zip(experts.stacks.values(), kinds, strict=True):
            meta = stack.weight4bit.to("meta")
            kind.part_of_weight(meta, Cut(cut.sizes, rank), stack.transposed)
    return cut


def become_parallel(
    experts: Experts4bit, kind: type[ParallelExperts4bit], cut: Cut, place: Place
) -> None:
    """``experts`` in place: from now on this process's part of them."""
    experts.__class__ = _class_of(kind, experts.family)
    experts._become_shard(place, cut)


@functools.cache
def _class_of(kind: type, family: type) -> type:
    whole = class_of(family)
    own = {"__doc__": kind.__doc__, "__module__": kind.__module__, "kind": kind}
    return type(f"{kind.__name__.removesuffix('Experts4bit')}{whole.__name__}", (kind, whole), own)


def _blank(kind: type, family: type) -> ParallelExperts4bit:
    cls = _class_of(kind, family)
    return cls.__new__(cls)
