"""How a dimension is cut among processes, and the collectives that move its parts."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from ..functional import differentiable_once


def shard_sizes(total: int, parts: int, unit: int = 32) -> list[int]:
    """``total`` in ``parts`` multiples of ``unit`` as equal as they can be, larger ones first; the last takes the rest.

    One rule for rows and columns, so that the outputs of column-parallel layers are cut as the inputs of the
    row-parallel layer behind them. Raises ValueError if a part would be empty.
    """
    units = -(-total // unit)
    if units < parts:
        raise ValueError(
            f"unit: expected at least {parts} units, one for each process, got {units} of {unit} in {total}"
        )
    sizes = _even(units, parts, unit)
    sizes[-1] -= units * unit - total
    return sizes


def _even(units: int, parts: int, unit: int = 1) -> list[int]:
    return [(units // parts + (part < units % parts)) * unit for part in range(parts)]


@dataclasses.dataclass(frozen=True)
class Cut:
    """A dimension in parts, one for each process of the group."""

    sizes: list[int]
    rank: int

    @property
    def first(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def size(self) -> int:
        return self.sizes[self.rank]

    def own(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This process's part of a whole tensor: a view."""
        return tensor.narrow(dim, self.first, self.size)


@dataclasses.dataclass(frozen=True)
class Place:
    """A group of processes and which of them this is."""

    group: dist.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, group: object) -> Place:
        """``group``: a ProcessGroup, a 1-D DeviceMesh, or None for the default group."""
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "group: expected torch.distributed to be initialized; call init_process_group first"
            )
        if group is not None and not isinstance(group, dist.ProcessGroup):
            if not hasattr(group, "get_group"):
                raise TypeError(
                    f"group: expected a ProcessGroup, DeviceMesh or None, got {type(group).__name__}"
                )
            if group.ndim != 1:
                raise ValueError(
                    f"group: expected a DeviceMesh of one dimension, as mesh['tp'] is, got {group.ndim}"
                )
            group = group.get_group()
        group = dist.group.WORLD if group is None else group
        if (rank := dist.get_rank(group)) < 0:
            raise ValueError("group: expected one that this process is in")
        return cls(group, rank, dist.get_world_size(group))

    def __deepcopy__(self, memo) -> Place:
        return self  # a process group cannot be copied

    def cut(self, total: int, unit: int) -> Cut:
        return Cut(shard_sizes(total, self.size, unit), self.rank)

    def cut_evenly(self, total: int) -> Cut:
        """In parts that may be empty."""
        return Cut(_even(total, self.size), self.rank)

    # -- collectives: each is called by all processes of the group ------------------------------------

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the group, in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather(self, tensor: torch.Tensor, cut: Cut) -> torch.Tensor:
        """``[M, cut.size]`` of each process, side by side: ``[M, total]``."""
        widest = max(cut.sizes)  # collectives want equal sizes
        padded = tensor.new_zeros(tensor.shape[0], widest)
        padded[:, : cut.size] = tensor
        parts = [torch.empty_like(padded) for _ in cut.sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:, :size] for part, size in zip(parts, cut.sizes)], 1)

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor of the group's first process, in place. (A sum, since torch.compile knows no broadcast.)"""
        return self.all_reduce(tensor if self.rank == 0 else tensor.zero_())


class GatherColumns(torch.autograd.Function):
    """``[M, part] -> [M, total]`` by all-gather; backward: the own columns of a gradient that all processes have."""

    @staticmethod
    def forward(ctx, x, place, cut):
        ctx.cut = cut
        return place.all_gather(x, cut)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dy):
        return ctx.cut.own(dy, 1).contiguous(), None, None


class OwnColumns(torch.autograd.Function):
    """``[M, total] -> [M, part]``, the own columns; backward: all-gather, so that all processes have dx whole."""

    @staticmethod
    def forward(ctx, x, place, cut):
        ctx.rest = place, cut
        return cut.own(x, 1).contiguous()

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dy):
        place, cut = ctx.rest
        return place.all_gather(dy, cut), None, None


class SumOverProcesses(torch.autograd.Function):
    """The sum of the tensors of all processes; backward: the gradient, which all processes have."""

    @staticmethod
    def forward(ctx, y, place):
        return place.all_reduce(y.clone())

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dy):
        return dy, None


class SumGradients(torch.autograd.Function):
    """A tensor that all processes have, to a part of each; backward: the sum of the gradients of all parts."""

    @staticmethod
    def forward(ctx, x, place):
        ctx.place = place
        return x.view_as(x)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dy):
        return ctx.place.all_reduce(dy.clone(memory_format=torch.contiguous_format)), None


class OnFirst(torch.autograd.Function):
    """What is added once: the tensor on the first process, zeros elsewhere; backward: the gradient, which all have."""

    @staticmethod
    def forward(ctx, x, place):
        return x.clone() if place.rank == 0 else torch.zeros_like(x)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dy):
        return dy, None
