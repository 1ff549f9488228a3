"""The coefficient of the penalty: fixed, or steered towards a divergence."""

from __future__ import annotations

import math


class FixedKL:
    """A coefficient that stays as it is.

    Raises ValueError for a coefficient that is negative or not finite.

    Examples:
        >>> from lowrank_kernels import rlhf
        >>> control = rlhf.FixedKL(0.05)
        >>> control.update(3.0, 64)
        >>> control.value
        0.05
    """

    def __init__(self, coef: float):
        _expect("coef", coef, coef >= 0, "a number >= 0")
        self.value = float(coef)

    def update(self, kl: float, n: int) -> None:
        """Does nothing.

        Examples:
            >>> from lowrank_kernels import rlhf
            >>> rlhf.FixedKL(0.0).update(1.0, 8)
        """

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs: the coefficient.

        Examples:
            >>> from lowrank_kernels import rlhf
            >>> rlhf.FixedKL(0.5).state_dict()
            {'value': 0.5}
        """
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes the coefficient of :meth:`state_dict`.

        Examples:
            >>> from lowrank_kernels import rlhf
            >>> control = rlhf.FixedKL(0.5)
            >>> control.load_state_dict({"value": 0.25})
            >>> control.value
            0.25
        """
        _expect("state['value']", state["value"], state["value"] >= 0, "a number >= 0")
        self.value = float(state["value"])


class AdaptiveKL(FixedKL):
    """A coefficient that grows while the divergence is above ``target``, and shrinks below.

    After n episodes of a sequence's mean divergence kl: ``value *= 1 + clip(kl / target - 1, -0.2, 0.2) n / horizon``.
    Divergences are in nats per sequence. Source: Ziegler et al., arXiv 1909.08593.

    Raises ValueError for a coefficient, target or horizon that is not positive and finite.

    Examples:
        >>> from lowrank_kernels import rlhf
        >>> control = rlhf.AdaptiveKL(0.1, target=6.0, horizon=1000)
        >>> control.update(kl=12.0, n=100)
        >>> round(control.value, 6)
        0.102
    """

    def __init__(self, coef: float, target: float = 6.0, horizon: float = 10_000):
        _expect("coef", coef, coef > 0, "a number > 0, since it is multiplied")
        _expect("target", target, target > 0, "a number > 0")
        _expect("horizon", horizon, horizon > 0, "a number > 0")
        super().__init__(coef)
        self.target, self.horizon = float(target), float(horizon)

    def update(self, kl: float, n: int) -> None:
        """One step of the controller; raises ValueError for a divergence that is not finite.

        Examples:
            >>> from lowrank_kernels import rlhf
            >>> control = rlhf.AdaptiveKL(0.1)
            >>> control.update(0.0, 10_000)
            >>> round(control.value, 6)
            0.08
        """
        _expect("kl", kl, True, "a finite number")
        _expect("n", n, 0 <= n <= self.horizon, f"a number from 0 to the horizon, {self.horizon:g}")
        self.value *= 1 + min(max(kl / self.target - 1, -0.2), 0.2) * n / self.horizon


def _expect(name: str, number: float, holds: bool, expected: str) -> None:
    if not (math.isfinite(number) and holds):
        raise ValueError(f"{name}: expected {expected}, got {number!r}")
