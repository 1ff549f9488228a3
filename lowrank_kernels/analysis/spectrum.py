"""Singular values of what an adapter adds, ``ΔW = scaling · B A``, without the matrix ``ΔW [N, K]``.

``B = Q_b R_b`` and ``Aᵀ = Q_a R_a``, so ``ΔW = scaling · Q_b (R_b R_aᵀ) Q_aᵀ``, and the singular values are those of a
matrix ``[r, r]``. All of it is float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch import nn

from ..adapter import AdapterLayer
from ..adapter_files import assign
from ..experts import GroupedLinear4bit
from ..model_adapters import adapters
from ..named_adapters import NamedAdapters

_ROWS = 1024  # of a weight, dequantized at a time for its norm


class LayerSpectrum(NamedTuple):
    """One layer, or one expert of a stack.

    ``singular_values``: float64 ``[min(r, N, K)]``, descending; ``r``: the adapter's rank; ``relative_norm``:
    ``‖ΔW‖ / ‖W‖`` by Frobenius, None unless asked for.

    Examples:
        >>> import torch
        >>> from lowrank_kernels import analysis
        >>> layer = analysis.LayerSpectrum(torch.tensor([2.0, 1.0, 1.0]), r=3)
        >>> layer.stable_rank, layer.rank(0.9)
        (1.5, 3)
    """

    singular_values: torch.Tensor
    r: int
    relative_norm: float | None = None

    @property
    def norm(self) -> float:
        """``‖ΔW‖``, Frobenius."""
        return self.singular_values.norm().item()

    @property
    def stable_rank(self) -> float:
        """``Σ σ² / max σ²``: how many directions of the largest size would make the norm; 0 of a zero matrix."""
        squares = self.singular_values.square()
        return (squares.sum() / squares[0]).item() if squares[0] > 0 else 0.0

    def rank(self, energy: float = 0.9) -> int:
        """The least k with ``Σ_{i ≤ k} σ_i² ≥ energy · Σ σ²``; 0 of a zero matrix.

        Raises ValueError unless ``0 < energy <= 1``.

        Examples:
            >>> import torch
            >>> from lowrank_kernels import analysis
            >>> analysis.LayerSpectrum(torch.tensor([3.0, 1.0, 0.1]), r=3).rank(0.95)
            2
        """
        if not 0 < energy <= 1:
            raise ValueError(f"energy: expected a number above 0 and up to 1, got {energy!r}")
        squares = self.singular_values.double().square()
        if not squares.any():
            return 0
        # One rounding below, so that all of the energy is not more than there is.
        reached = squares.cumsum(0) / squares.sum() >= energy - 1e-12
        return int(reached.int().argmax()) + 1


class Spectrum(Mapping):
    """:class:`LayerSpectrum` by path, in the model's order, as :func:`spectrum` returns it; printed, a table.

    Examples:
        >>> import torch
        >>> from lowrank_kernels.analysis import LayerSpectrum, Spectrum
        >>> layers = {"q_proj": LayerSpectrum(torch.tensor([3.0, 1.0]), r=2, relative_norm=0.01)}
        >>> print(Spectrum(layers))
        layer      r    rank for 90 %    stable rank    norm  of W
        -------  ---  ---------------  -------------  ------  ------
        q_proj     2                1           1.11   3.162  1.00%
    """

    def __init__(self, layers: dict[str, LayerSpectrum]) -> None:
        self._layers = layers

    def __getitem__(self, path: str) -> LayerSpectrum:
        return self._layers[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        header = ["layer", "r", "rank for 90 %", "stable rank", "norm", "of W"]
        rows = [
            [path, of.r, of.rank(), f"{of.stable_rank:.2f}", f"{of.norm:.4g}",
             "-" if of.relative_norm is None else f"{of.relative_norm:.2%}"]
            for path, of in self.items()
        ]  # fmt: skip
        return tabulate(rows, header)

    def mean_rank(self, energy: float = 0.9) -> float:
        """The mean over layers of :meth:`LayerSpectrum.rank`.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
            >>> report = lk.replace_linear(model, r=4, progress=False)
            >>> lk.analysis.spectrum(model).mean_rank()  # B is zero still
            0.0
        """
        return sum(of.rank(energy) for of in self.values()) / max(1, len(self))


def spectrum(model: nn.Module, name: str = "default", relative: bool = False) -> Spectrum:
    """The singular values of ``scaling · B A`` of adapter ``name`` in each layer.

    Args:
        model: with :class:`LoRALinear4bit` or stacks of experts, of which each expert is a row, ``path[e]``.
        name: the adapter.
        relative: whether to compare norms with those of the weights, which are read in pieces for it.

    Returns:
        :class:`Spectrum`: a mapping from paths to :class:`LayerSpectrum`.

    Raises ValueError for an adapter that no layer has, or numbers that are not finite.

    Source: the comparison of updates by their spectrum is Biderman et al., arXiv 2405.09673.

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> report = lk.replace_linear(model, r=4, progress=False)
        >>> _ = torch.nn.init.normal_(model[0].lora_B["default"].weight)
        >>> spectrum = lk.analysis.spectrum(model)
        >>> spectrum["0"].singular_values.shape, spectrum["0"].r
        (torch.Size([4]), 4)
    """
    found: dict[str, LayerSpectrum] = {}
    for path, layer in _layers(model, name).items():
        A, B, scaling = _factors(layer, name)
        values = _svd(path, A, B)[1] * abs(scaling)
        norms = _norms(layer) if relative else [None] * len(values)
        for e, (singular, norm) in enumerate(zip(values, norms)):
            share = None if norm is None else singular.norm().item() / norm
            of = path if len(values) == 1 and not _is_stack(layer) else f"{path}[{e}]"
            found[of] = LayerSpectrum(singular, layer.r[name], share)
    return Spectrum(found)


@torch.no_grad()
def truncate(
    model: nn.Module, name: str = "default", energy: float = 0.9, into: str | None = None
) -> dict[str, int]:
    """Makes of adapter ``name`` the closest one that keeps ``energy`` of each layer's squared norm; its ranks by layer.

    Of each layer the largest k singular values and their vectors stay, k as of :meth:`LayerSpectrum.rank` and 1 at
    least: no other matrix of rank k is closer to ``B A``. Experts of a stack have one rank, the largest that one of
    them needs. :func:`save_adapter` writes ranks that differ as PEFT's ``rank_pattern``.

    Args:
        model, name, energy: see :func:`spectrum` and :meth:`LayerSpectrum.rank`.
        into: the name of a new adapter for it; None: it takes the place of ``name``, with new parameters.

    Raises ValueError as :func:`spectrum`, and for an ``into`` that a layer has already.

    Source: Eckart and Young, 1936.

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> report = lk.replace_linear(model, r=4, progress=False)
        >>> B = torch.nn.init.normal_(model[0].lora_B["default"].weight)
        >>> with torch.no_grad():
        ...     B[:, 2:] = 0  # two of four ranks are used
        >>> lk.analysis.truncate(model, energy=1.0)
        {'0': 2}
    """
    layers = _layers(model, name)
    if into is not None and (taken := [path for path, layer in layers.items() if into in layer.r]):
        raise ValueError(f"into: expected a new adapter, got {into!r}, which {taken[0]} has")
    smaller: dict[str, AdapterLayer] = {}
    for path, layer in layers.items():
        A, B, scaling = _factors(layer, name)
        U, singular, V = _svd(path, A, B)
        k = max(1, *(LayerSpectrum(values, 0).rank(energy) for values in singular))
        root = singular[:, :k].sqrt()
        smaller[path] = _as_saved(
            layer, name, k, root[..., None] * V[..., :k].mT, U[..., :k] * root[:, None], scaling
        )
    for path, layer in layers.items():
        was_active = layer.active_adapter == name
        dtype = layer.adapter_parameters(name)[0].dtype
        requires_grad = layer.adapter_parameters(name)[0].requires_grad
        assign(layer, into or name, smaller[path])
        for module in layer.adapter_modules(into or name):
            module.to(dtype).requires_grad_(requires_grad and into is None)
        if was_active and into is None:
            layer.set_adapter(name)
    return {path: adapter.r for path, adapter in smaller.items()}


def _layers(model: nn.Module, name: str) -> dict[str, NamedAdapters]:
    known = adapters(model)
    if name not in known:
        raise ValueError(
            f"name: expected an adapter of the model, one of {sorted(known)}, got {name!r}"
        )
    return known[name].layers


def _is_stack(layer: NamedAdapters) -> bool:
    return isinstance(layer, GroupedLinear4bit)


def _factors(layer: NamedAdapters, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A ``[E, r, K]``, B ``[E, N, r]`` and the scaling; a linear layer is one expert."""
    if _is_stack(layer):
        A, B, scaling = layer.factors(name)
    else:
        A, B = (parameter[None] for parameter in layer.whole_adapter(name))
        scaling = layer.scaling[name]
    return A.detach().double(), B.detach().double(), scaling


def _svd(
    path: str, A: torch.Tensor, B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``B A = U diag(σ) Vᵀ`` of each expert: U ``[E, N, k]``, σ ``[E, k]``, V ``[E, K, k]``."""
    if not (A.isfinite().all() and B.isfinite().all()):
        raise ValueError(f"{path}: expected an adapter of finite numbers, got a NaN or an infinity")
    Q_b, R_b = torch.linalg.qr(B)
    Q_a, R_a = torch.linalg.qr(A.mT)
    U, singular, Vt = torch.linalg.svd(R_b @ R_a.mT, full_matrices=False)
    return Q_b @ U, singular, Q_a @ Vt.mT


def _as_saved(
    layer: NamedAdapters, name: str, k: int, A: torch.Tensor, B: torch.Tensor, scaling: float
) -> AdapterLayer:
    """Factors ``A [E, k, K]``, ``B [E, N, k]`` in PEFT's layout, with settings that keep the scaling."""
    rslora = layer.use_rslora[name]
    alpha = scaling * (k**0.5 if rslora else k)
    if _is_stack(layer):
        A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    else:
        A, B = A[0], B[0]
    return AdapterLayer(k, alpha, layer.lora_dropout[name], rslora, A.float(), B.float())


def _norms(layer: NamedAdapters) -> list[float]:
    """``‖W‖`` of each expert, or of the one weight."""
    w = layer.weight4bit
    if not _is_stack(layer):
        return [_norm(w)]
    return [_norm_of(w.narrow(0, e, 1).dequantize(torch.float32)) for e in range(w.shape[0])]


def _norm(w) -> float:
    """In pieces of rows where blocks fit them, else at once."""
    step = _ROWS if w.shape[1] % w.blocksize == 0 else w.shape[0]
    square = 0.0
    for start in range(0, w.shape[0], step):
        rows = w.narrow(0, start, min(step, w.shape[0] - start))
        square += _norm_of(rows.dequantize(torch.float32)) ** 2
    return square**0.5


def _norm_of(W: torch.Tensor) -> float:
    return torch.linalg.vector_norm(W, dtype=torch.float64).item()
