"""What the demos share."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterable, Iterator

import torch

WARM_UP = 4  # steps over which the learning rate rises
LOOK_EVERY = 6  # steps between lines of the table


@contextlib.contextmanager
def medium_precision() -> Iterator[None]:
    """Within the block float32 products may be those of bfloat16 numbers, where the CPU has them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def chapter(title: str) -> None:
    """Prints it, underlined."""
    print(f"\n{title}\n{'-' * len(title)}", flush=True)


def adamw(
    parameters: Iterable[torch.nn.Parameter], lr: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """(optimizer, schedule): the rate rises to ``lr`` and falls to a tenth of it over ``steps``."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, max(0.1, 1 - step / steps))
    )
    return optimizer, schedule


def loss_fell(losses: list[float]) -> bool:
    """The mean of the last quarter is below that of the first, and everything is finite."""
    quarter = max(1, len(losses) // 4)
    first, last = statistics.fmean(losses[:quarter]), statistics.fmean(losses[-quarter:])
    return all(map(math.isfinite, losses)) and last < first
