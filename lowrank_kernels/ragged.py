"""Rows of different lengths: nested tensors, of which all rows go through a function at once, and padded ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F


def padded(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``[length]`` with zeros behind them, ``[rows, longest]``, and a mask that is true where they are."""
    longest = max(map(len, rows))
    stacked = torch.stack([F.pad(row, (0, longest - len(row))) for row in rows])
    return stacked, torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]


def is_ragged(x: object) -> bool:
    """Whether x is a tensor without strides: one of torch's nested tensors, or of a layout that is not taken."""
    return isinstance(x, torch.Tensor) and (x.is_nested or x.layout is not torch.strided)


def layout_error(x: torch.Tensor) -> TypeError:
    """What is raised for a tensor that is neither dense nor nested."""
    return TypeError(f"x: expected a dense tensor or a nested one, got one of layout {x.layout}")


def by_rows(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """``function``, ``[M, K] -> [M, N]``, of a nested tensor of ``[..., K]``: one of ``[..., N]`` in the same layout.

    Differentiable as ``function`` is. Raises TypeError where the last dimension is the ragged one, and for
    tensors that are no nested ones (sparse, MKL-DNN's).
    """
    if not x.is_nested:
        raise layout_error(x)
    if x.layout == torch.jagged:
        if x._ragged_idx == x.dim() - 1:
            raise TypeError(
                "x: expected a nested tensor whose last dimension is K everywhere, got one that is ragged there"
            )
        # The same offsets, so that torch knows the result to have the shape of x.
        return torch.nested.nested_tensor_from_jagged(
            function(x.values()), x.offsets(), x.lengths(), jagged_dim=x._ragged_idx
        )
    parts = x.unbind()
    widths = {part.shape[-1] if part.dim() else None for part in parts}
    if len(widths) > 1 or None in widths:
        raise TypeError(
            f"x: expected a nested tensor of [..., K] with one K, got last dimensions {sorted(widths, key=str)}"
        )
    if not parts:
        return x
    y = function(torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]))
    rows = y.split([math.prod(part.shape[:-1]) for part in parts])
    made = [own.reshape(*part.shape[:-1], y.shape[-1]) for own, part in zip(rows, parts)]
    return torch.nested.as_nested_tensor(made, layout=torch.strided)
