"""PEFT's layer for ``target_parameters`` over :class:`Experts4bit`: what ``get_peft_model`` makes of one stack.

Imported by peft_hook.py, when PEFT meets the first such module.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator

import torch
from peft.tuners.lora import layer as peft_lora
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge

from ..experts import Experts4bit, Factors, GroupedLinear4bit


class PeftExperts4bit(peft_lora.ParamWrapper):
    """PEFT's ``ParamWrapper`` around one stack of an :class:`Experts4bit`.

    Everything that PEFT does with such a parameter, but: only experts that tokens chose are read, each with its adapter
    in one operator, and no dense delta is made. Several active adapters are one of joined ranks. Merging quantizes
    ``W + Σ scaling · B A`` once, and ``unmerge`` restores the bytes.
    """

    @property
    def stack(self) -> GroupedLinear4bit:
        return self.get_base_layer()._modules[self.parameter_name]

    def get_param(self):
        """What PEFT asks of the parameter: shape, device and dtype of the stack before it was quantized.

        The shape is as the class of the experts has it, also where the stack lies the other way round.
        """
        stack = self.stack
        E, N, K = stack.num_experts, stack.out_features, stack.in_features
        shape = (E, K, N) if self.get_base_layer().is_transposed else (E, N, K)
        return types.SimpleNamespace(
            shape=torch.Size(shape), ndim=3, device=stack.weight.device, dtype=stack.compute_dtype, requires_grad=False
        )  # fmt: skip

    def factors(self, names: list[str]) -> list[Factors]:
        """A [E, r, K], B [E, N, r] and scaling of these adapters."""
        found, stack = [], self.stack
        for name in names:
            if name in self.lora_A:
                A, B = self.lora_A[name].weight, self.lora_B[name].weight
                found.append(stack.factors_of(A, B, self.r[name], self.scaling[name]))
        return found

    @contextlib.contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        stack = self.stack
        before, stack.lent = stack.lent, self.factors(list(active_adapters or ()))
        try:
            yield
        finally:
            stack.lent = before

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names or () if name in self.lora_A]
        if not names:
            return
        factors = self.factors([*self.merged_adapters, *names])
        self.stack.merge_factors(
            factors
        )  # quantizing refuses what is not finite, whatever safe_merge says
        self.merged_adapters += names

    def unmerge(self) -> None:
        if not self.merged:
            return super().unmerge()  # which warns
        self.merged_adapters.clear()
        self.stack.unmerge_factors()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> Experts4bit:
        """The experts without this layer and those inside it, for PEFT's ``unload`` and ``merge_and_unload``."""
        experts = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        for stack in experts.stacks.values():
            stack._unmerged = None  # nobody is left to restore it
        return experts


# PEFT finds the wrapper of a parameter that a further adapter is for by the name of its class.
PeftExperts4bit.__name__ = "ParamWrapper"


def dispatch(target, adapter_name: str, parameter_name: str, config, **kwargs) -> PeftExperts4bit:
    """The layer for the stack ``parameter_name`` of ``target``, whose base is an Experts4bit.

    Raises ValueError for a stack that has adapters of its own, and as PEFT's ``ParamWrapper``.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if own := list(base.stacks[parameter_name].r):
        raise ValueError(
            f"target_parameters: expected stacks without adapters, got {parameter_name}, which has adapters of its "
            f"own: {own}; delete them (delete_adapter), or leave PEFT out"
        )
    return PeftExperts4bit(
        target, adapter_name, parameter_name=parameter_name, config=config, **kwargs
    )


@contextlib.contextmanager
def stacks_as_parameters() -> Iterator[None]:
    """Within the block an Experts4bit lists its stacks among its own parameters, by which PEFT finds them."""
    Experts4bit.lists_stacks += 1
    try:
        yield
    finally:
        Experts4bit.lists_stacks -= 1
