"""``Part``: what every layer has of which this process holds a part."""

from __future__ import annotations

import torch
from torch import nn

from ..adapter import AdapterSettings
from ..formats import Weight4bit
from ..multi_lora.in_force import in_force
from ..named_adapters import NamedAdapters, only_a_part
from .shards import Place


class Part(NamedAdapters):
    """The part of a layer that this process holds, adapters included; ``r`` and the features are the whole layer's.

    A layer becomes one by its ``__class__``, which derives from this class and from the layer's own. A kind of parts
    has ``shard_of_adapter(A, B)``, this process's part of them, ``gather_adapter(name)``, whole A and B on all
    processes, which all call it, and ``parts()``, the parameters of which other processes have other parts.
    """

    place: Place

    def __init__(self, *args, **kwargs) -> None:
        raise TypeError(
            f"{type(self).__name__}: expected lowrank_kernels.distributed.parallelize to make it"
        )

    def _keep_parts(self, w: Weight4bit) -> None:
        """Takes ``w``, the part of the weight, for it, and of the adapters their parts."""
        self._set_weight4bit(w)
        for name in self.r:
            self._keep_shard(name)

    def _keep_shard(self, name: str) -> None:
        parts = self.shard_of_adapter(*self.adapter_parameters(name))
        for modules, part in zip((self.lora_A, self.lora_B), parts, strict=True):
            old = modules[name].weight
            new = nn.Parameter(part.detach().clone(), requires_grad=old.requires_grad)
            modules[name].weight = new
            modules[name].out_features, modules[name].in_features = new.shape

    def _add_adapter(self, name: str, settings: AdapterSettings) -> None:
        """Of A and B, which each process draws whole, it keeps its part: with equal generators one process's."""
        super()._add_adapter(name, settings)
        self._keep_shard(name)

    def whole_adapter(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        raise only_a_part()

    def merge(self) -> None:
        """Not implemented for parts of a layer: raises RuntimeError. Merge before ``parallelize``."""
        raise RuntimeError("merge: not implemented for parallel layers; merge before parallelize")

    def _check_no_plan(self) -> None:
        if in_force.entries and self.in_force(in_force.entries) is not None:
            raise RuntimeError(
                "forward under a plan: AdapterBank is not implemented for parallel layers; use one active adapter"
            )
