"""What the demos share."""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from tqdm import tqdm

from . import UserError, models

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


def prepare(args: argparse.Namespace) -> None:
    """Threads and the folder ``--out``; raises UserError where that or matplotlib is missing."""
    if args.threads:
        torch.set_num_threads(args.threads)
    models.require("matplotlib")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}") from error


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


def fit(
    parameters: Iterable[torch.nn.Parameter],
    lr: float,
    steps: int,
    loss_at: Callable[[int], torch.Tensor],
    words: str,
) -> list[float]:
    """Trains by :func:`adamw` on ``loss_at(step)``; the loss of each step. ``words`` are before the bar."""
    optimizer, schedule = adamw(parameters, lr, steps)
    losses = []
    for step in tqdm(range(steps), desc=words, disable=None):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def taken(rows: Sequence, step: int, size: int) -> list:
    """The ``size`` rows of a step, one step's after another's, from the start again at the end."""
    return [rows[(step * size + i) % len(rows)] for i in range(size)]


def ends(values: Sequence[float]) -> tuple[float, float]:
    """The means of the first and the last quarter."""
    quarter = max(1, len(values) // 4)
    return statistics.fmean(values[:quarter]), statistics.fmean(values[-quarter:])


def loss_fell(losses: list[float]) -> bool:
    """The mean of the last quarter is below that of the first, and everything is finite."""
    first, last = ends(losses)
    return all(map(math.isfinite, losses)) and last < first
