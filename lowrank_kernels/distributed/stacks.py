"""Parts of a stack of experts: some of the experts, or of every expert a slice of its outputs or inputs.

========  ==================  ==============================  ============================================
part of   weight              adapters                        communication
========  ==================  ==============================  ============================================
experts   those of process p  A and B of its experts          none: what other processes have adds nothing
outputs   W, B, bias by N     A on all processes              backward: ``dA = Σ_p scaling (dy_p B_p)ᵀ x``
inputs    W, A by K           B and bias on all processes     backward: ``dB = Σ_p scaling dyᵀ (x_p A_pᵀ)``
========  ==================  ==============================  ============================================

So base and adapter stay one operator: the product that an adapter needs of another process's part is a gradient, and
no forward waits for it. Sums of x's gradients and of outputs are those of the module of experts (experts.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from ..experts import Factors, GroupedLinear4bit
from ..formats import Weight4bit
from .parts import Part
from .shards import Cut, OnFirst, Place, SumGradients, SumOverProcesses


class PartOfStack(Part, GroupedLinear4bit):
    """What the kinds have in common. ``num_experts`` and the features are those of the whole stack.

    ``cut`` says which experts or features are here.
    """

    cut: Cut

    def _become_part(self, place: Place, cut: Cut) -> None:
        """Called once, on a whole stack whose class was changed to this one."""
        self.place, self.cut = place, cut
        self._keep_parts(self.part_of_weight(self.weight4bit, cut, self.transposed))

    def factors_of(self, A: torch.Tensor, B: torch.Tensor, r: int, scaling: float) -> Factors:
        E, rows, columns = self._weight4bit.shape
        N, K = (columns, rows) if self.transposed else (rows, columns)
        if (tuple(A.shape), tuple(B.shape)) != ((r * E, K), (N, r * E)):
            raise RuntimeError(
                f"A, B: expected this process's part of an adapter, got shapes {tuple(A.shape)} and {tuple(B.shape)}: "
                "PEFT's own adapters are not implemented for parallel layers; use add_adapter"
            )
        return super().factors_of(A, B, r, scaling)

    def forward(self, x, offsets, bias=None, tokens=None, num_tokens=None):
        self._check_no_plan()
        return super().forward(x, offsets, bias)

    def extra_repr(self) -> str:
        part = f"{self.cut.first}:{self.cut.first + self.cut.size}"
        return (
            f"{super().extra_repr()}, {self._kind}={part} ({self.place.rank} of {self.place.size})"
        )


class ExpertsOfStack(PartOfStack):
    """The experts ``cut`` of a stack, whole."""

    _kind = "experts"

    @staticmethod
    def part_of_weight(w: Weight4bit, cut: Cut, transposed: bool) -> Weight4bit:
        return w.narrow(0, cut.first, cut.size)

    def shard_of_adapter(
        self, A: torch.Tensor, B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        E, (N, ranks) = self.num_experts, B.shape
        r = ranks // E
        A = self.cut.own(A.reshape(E, r, A.shape[1]), 0).flatten(0, 1)
        return A, self.cut.own(B.reshape(N, r, E), 2).flatten(1)

    def gather_adapter(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole A and B on all processes, which all call this."""
        A, B = (parameter.detach() for parameter in self.adapter_parameters(name))
        N, r = self.out_features, self.r[name]
        rows = Cut([r * size for size in self.cut.sizes], self.cut.rank)
        A = self.place.all_gather(A.T, rows).T
        B = self.place.all_gather(B.reshape(N * r, self.cut.size), self.cut)
        return A, B.reshape(N, r * self.num_experts)

    def parts(self) -> Iterator[nn.Parameter]:
        """The parameters of which other processes have other parts."""
        yield from self.parameters()


class OutputsOfStack(PartOfStack):
    """The outputs of every expert that feed the features ``cut``: of gate and up alike."""

    _kind = "features"

    def shard_of_adapter(
        self, A: torch.Tensor, B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return A, B[self.rows(self.cut).to(B.device)]

    def gather_adapter(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole A and B on all processes, which all call this."""
        A, B = (parameter.detach() for parameter in self.adapter_parameters(name))
        rows = [self.rows(Cut(self.cut.sizes, rank)) for rank in range(self.place.size)]
        gathered = self.place.all_gather(B.T, Cut([len(r) for r in rows], self.place.rank)).T
        whole = torch.empty_like(gathered)
        whole[torch.cat(rows).to(whole.device)] = gathered
        return A, whole

    def factors(self, name: str) -> Factors:
        A, B = self.adapter_parameters(name)
        A = SumGradients.apply(A, self.place)
        return self.factors_of(A, B, self.r[name], self.scaling[name])

    def parts(self) -> Iterator[nn.Parameter]:
        """The parameters of which other processes have other parts."""
        yield from self.lora_B.parameters()

    @staticmethod
    def rows(cut: Cut) -> torch.Tensor:
        """Which of the whole stack's outputs the features of ``cut`` are."""
        return torch.arange(cut.first, cut.first + cut.size)

    @staticmethod
    def part_of_weight(w: Weight4bit, cut: Cut, transposed: bool) -> Weight4bit:
        return w.narrow(2 if transposed else 1, cut.first, cut.size)


class ConcatenatedOutputsOfStack(OutputsOfStack):
    """``[gate; up]``: the features of gate, then those of up."""

    @staticmethod
    def rows(cut: Cut) -> torch.Tensor:
        gate = OutputsOfStack.rows(cut)
        return torch.cat((gate, gate + sum(cut.sizes)))

    @staticmethod
    def part_of_weight(w: Weight4bit, cut: Cut, transposed: bool) -> Weight4bit:
        E, rows, columns = w.shape
        # The same elements in the same order, gate and up in matrices (or rows) of their own.
        halves = (E, 2 * rows, columns // 2) if transposed else (2 * E, rows // 2, columns)
        shape = (E, rows, 2 * cut.size) if transposed else (E, 2 * cut.size, columns)
        part = OutputsOfStack.part_of_weight(
            dataclasses.replace(w, shape=torch.Size(halves)), cut, transposed
        )
        return dataclasses.replace(part, shape=torch.Size(shape))


class InterleavedOutputsOfStack(OutputsOfStack):
    """``[gate_0, up_0, gate_1, up_1, ...]``, as GPT-OSS has them."""

    @staticmethod
    def rows(cut: Cut) -> torch.Tensor:
        return torch.arange(2 * cut.first, 2 * (cut.first + cut.size))

    @staticmethod
    def part_of_weight(w: Weight4bit, cut: Cut, transposed: bool) -> Weight4bit:
        return w.narrow(2 if transposed else 1, 2 * cut.first, 2 * cut.size)


class InputsOfStack(PartOfStack):
    """The inputs ``cut`` of every expert, whose outputs are terms of a sum over processes; bias is added once.

    With ``sums_rows`` this sum is made here, row by row, for a norm that comes behind it.
    """

    _kind = "features"
    sums_rows = False

    def shard_of_adapter(
        self, A: torch.Tensor, B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cut.own(A, 1), B

    def gather_adapter(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole A and B on all processes, which all call this."""
        A, B = (parameter.detach() for parameter in self.adapter_parameters(name))
        return self.place.all_gather(A, self.cut), B

    def factors(self, name: str) -> Factors:
        A, B = self.adapter_parameters(name)
        B = SumGradients.apply(B, self.place)
        return self.factors_of(A, B, self.r[name], self.scaling[name])

    def parts(self) -> Iterator[nn.Parameter]:
        """The parameters of which other processes have other parts."""
        yield from self.lora_A.parameters()

    @staticmethod
    def part_of_weight(w: Weight4bit, cut: Cut, transposed: bool) -> Weight4bit:
        return w.narrow(1 if transposed else 2, cut.first, cut.size)

    def forward(self, x, offsets, bias=None, tokens=None, num_tokens=None):
        if bias is not None:
            bias = OnFirst.apply(bias, self.place)
        y = super().forward(x, offsets, bias)
        return SumOverProcesses.apply(y, self.place) if self.sums_rows else y
