"""A callback of transformers' Trainer that logs what is forgotten while a model trains."""

from __future__ import annotations

from collections.abc import Sequence

import transformers

from .forgetting import Forgetting, forgetting


class ForgettingCallback(transformers.TrainerCallback):
    """Adds ``forgetting/nll/<name>`` and ``forgetting/entropy/<name>`` to the Trainer's log every ``steps`` steps.

    Of :func:`forgetting`, before the first step and from then on; ``history`` has all of them as (step, Forgetting).

    Args:
        texts, names, tokenizer, max_length, batch_size: as of :func:`forgetting`.
        steps: optimizer steps from one to the next.

    Raises ValueError for steps < 1.

    Examples:
        >>> import lowrank_kernels as lk
        >>> lk.analysis.ForgettingCallback([[5, 6, 7]], ["default"], steps=100).history
        []
    """

    def __init__(
        self,
        texts: Sequence,
        names: Sequence[str],
        tokenizer=None,
        steps: int = 50,
        max_length: int = 512,
        batch_size: int = 8,
    ) -> None:
        if type(steps) is not int or steps < 1:
            raise ValueError(f"steps: expected an integer >= 1, got {steps!r}")
        self.arguments = (texts, names, tokenizer, max_length, batch_size)
        self.steps = steps
        self.history: list[tuple[int, Forgetting]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Measures before the first step.

        Examples:
            >>> import lowrank_kernels as lk
            >>> callback = lk.analysis.ForgettingCallback([[5, 6, 7]], ["default"])
        """
        self._measure(state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Measures every ``steps`` steps.

        Examples:
            >>> import lowrank_kernels as lk
            >>> callback = lk.analysis.ForgettingCallback([[5, 6, 7]], ["default"], steps=10)
        """
        if state.global_step % self.steps == 0:
            self._measure(state, model)

    def _measure(self, state, model) -> None:
        model = getattr(model, "module", model)  # of DistributedDataParallel
        if not hasattr(model, "get_output_embeddings"):
            model = model.model  # of a RoleModel
        seen = forgetting(model, *self.arguments)
        self.history.append((state.global_step, seen))
        logs: dict[str, float] = {"step": state.global_step}
        for name, row in seen.items():
            logs[f"forgetting/nll/{name}"] = row.nll
            logs[f"forgetting/entropy/{name}"] = row.entropy
        state.log_history.append(logs)
