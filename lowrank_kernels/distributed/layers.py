"""The shards that ``parallelize`` makes of layers: ``ColumnParallelLoRALinear4bit``, ``RowParallelLoRALinear4bit``."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from ..adapter import are_fused
from ..functional import autocast, dropout_seed, wants_grad
from ..nn import LoRALinear4bit
from ..ragged import by_rows, is_ragged
from ..schema import check_linear, check_tensor
from .functional import ColumnParallel, RowParallel
from .parts import Part
from .shards import Cut, GatherColumns, OwnColumns, Place


class ParallelLoRALinear4bit(Part, LoRALinear4bit):
    """What the two kinds have in common.

    ``in_features``, ``out_features`` and ``r`` are those of the whole layer; ``weight4bit``, the parameters and the
    state dict hold this process's part. ``weight_cut`` says which rows (column-parallel) or columns of W that is.
    Adapters are added, chosen, deleted, disabled and loaded as in one process, each call on all processes.
    """

    weight_cut: Cut

    def _become_shard(self, place: Place, unit: int, option: bool) -> None:
        """Called once, on a whole layer whose class was changed to this one."""
        self.place, self._option = place, option
        w = self.weight4bit
        self.weight_cut = place.cut(w.shape[self.weight_dim], unit)
        self._keep_parts(w.narrow(self.weight_dim, self.weight_cut.first, self.weight_cut.size))

    def parts(self) -> Iterator[nn.Parameter]:
        """The parameters of which other processes have other parts."""
        yield from (p for p in self.parameters() if p is not self.bias or self.weight_dim == 0)

    def _inputs(self, x: torch.Tensor) -> torch.Tensor:
        """x ready for the operator, rows [M, K of the weight]; raises as :func:`lora_linear_4bit`."""
        self._check_no_plan()
        check_tensor("x", x)
        x = autocast(x)
        return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if x.dim() else x

    def _arguments(self, x: torch.Tensor, cut: object) -> tuple:
        """The operator's after x, for the active adapter."""
        w, bias, name = self.weight4bit, self._parameters["bias"], self._active_adapter
        check_linear(x, *w.shape, w.device, bias)
        A = B = None
        scaling = dropout_p = 0.0
        if not self._disabled and name in self.r:
            if not are_fused(*self.adapter_modules(name)):
                raise RuntimeError(
                    f"forward: lora_A or lora_B of adapter {name!r} has hooks or is parametrized, which is not "
                    "implemented for parallel layers"
                )
            (A, B), scaling = self.adapter_parameters(name), self.scaling[name]
            dropout_p = self.lora_dropout[name] if self.training else 0.0
        wants_grad(
            x, w, A, B, bias
        )  # raises where int8, forward-mode derivatives, ... cannot be had
        seed = dropout_seed(dropout_p, x.device)  # drawn on all, which keeps generators in step
        seed = None if seed is None else self.place.from_first(seed)
        return A, B, bias, seed, self.place, cut, float(scaling), float(dropout_p), *w.op_args()

    def extra_repr(self) -> str:
        cut = self.weight_cut
        part = f"{cut.first}:{cut.first + cut.size}"
        return (
            f"{super().extra_repr()}, {self._kind}={part} ({self.place.rank} of {self.place.size})"
        )


class ColumnParallelLoRALinear4bit(ParallelLoRALinear4bit):
    """The outputs ``weight_cut`` of a layer whose x all processes have; formulas in :mod:`.functional`.

    Holds these rows of W, B and bias, and every process another part of the ranks of A. Returns
    ``[..., weight_cut.size]``, or with ``gather_output`` all of ``[..., out_features]`` on all processes.
    """

    weight_dim, _kind = 0, "outputs"

    def _become_shard(self, place, unit, option):
        super()._become_shard(place, unit, option)
        if self.bias is not None:
            part = self.weight_cut.own(self.bias.detach(), 0).clone()
            self.bias = nn.Parameter(part, requires_grad=self.bias.requires_grad)

    @property
    def gather_output(self) -> bool:
        return self._option

    def ranks(self, name: str) -> Cut:
        """The part of adapter ``name``'s ranks whose rows of A are here; empty if it has fewer than processes."""
        return self.place.cut_evenly(self.r[name])

    def shard_of_adapter(
        self, A: torch.Tensor, B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.place.cut_evenly(A.shape[0]).own(A, 0), self.weight_cut.own(B, 0)

    def gather_adapter(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole A and B on all processes, which all call this."""
        A, B = (parameter.detach() for parameter in self.adapter_parameters(name))
        A = self.place.all_gather(A.T, self.ranks(name)).T
        return A, self.place.all_gather(B.T, self.weight_cut).T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if is_ragged(x):
            return by_rows(self.forward, x)
        rows = self._inputs(x)
        name = self._active_adapter
        ranks = self.ranks(name) if name in self.r else None
        y = ColumnParallel.apply(rows, *self._arguments(rows, ranks))
        if self.gather_output:
            y = GatherColumns.apply(y, self.place, self.weight_cut)
        return y.view(*x.shape[:-1], y.shape[1])


class RowParallelLoRALinear4bit(ParallelLoRALinear4bit):
    """The inputs ``weight_cut`` of a layer whose y all processes get; formulas in :mod:`.functional`.

    Holds these columns of W and A, a part of the rows of B, and all of bias, which is added once. x is
    ``[..., weight_cut.size]``, or without ``input_is_parallel`` ``[..., in_features]`` on all processes.
    """

    weight_dim, _kind = 1, "inputs"

    @property
    def input_is_parallel(self) -> bool:
        return self._option

    @property
    def outputs(self) -> Cut:
        """The rows of B that are here."""
        return self.place.cut_evenly(self.out_features)

    def shard_of_adapter(
        self, A: torch.Tensor, B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weight_cut.own(A, 1), self.outputs.own(B, 0)

    def gather_adapter(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole A and B on all processes, which all call this."""
        A, B = (parameter.detach() for parameter in self.adapter_parameters(name))
        B = self.place.all_gather(B.T, self.outputs).T
        return self.place.all_gather(A, self.weight_cut), B

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if is_ragged(x):
            return by_rows(self.forward, x)
        rows = self._inputs(x)
        if not self.input_is_parallel:
            if x.dim() == 0 or x.shape[-1] != self.in_features:
                raise ValueError(
                    f"x: expected shape [..., in_features = {self.in_features}] where input_is_parallel is "
                    f"False, got {tuple(x.shape)}"
                )
            rows = OwnColumns.apply(rows, self.place, self.weight_cut)
        y = RowParallel.apply(rows, *self._arguments(rows, (self.weight_cut, self.outputs)))
        return y.view(*x.shape[:-1], self.out_features)
