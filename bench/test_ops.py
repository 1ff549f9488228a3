"""Some cases of the suite under pytest-benchmark, for its options and its comparison of runs: ``make bench-pytest``.

``python -m pytest bench --benchmark-only`` is the same. Providers, the check of their results, weights that take turns
so that caches are cold, and the number of rounds are those of the suite.
"""

from __future__ import annotations

import pytest

from lowrank_kernels.benchmark import timing
from lowrank_kernels.benchmark.providers import Unavailable

from . import suite

SECONDS, MIN_ROUNDS = 0.5, 5  # timed per case and provider
OPS = ("linear_4bit", "linear_4bit_dx", "lora_linear_4bit", "lora_linear_4bit_fwd_bwd")
SIZES = suite.SIZES["cpu"].chosen([suite.SIZES["cpu"].shapes[0]], [1, 16])
ENTRIES = [
    pytest.param(case, provider, id=f"{case.id}-{name}")
    for case, providers in suite.entries(SIZES, only="-float32-cold")
    for name, provider in providers.items()
    if case.op in OPS
]


@pytest.fixture(autouse=True, scope="module")
def freed_memory_is_kept():
    timing.keep_freed_memory()


@pytest.mark.parametrize("case, provider", ENTRIES)
def test_op(benchmark, case, provider):
    benchmark.group = case.id
    try:
        with provider.entered():
            timer = provider.timer(case)  # raises if a result is wrong
            benchmark.pedantic(
                lambda call: call(),
                setup=lambda: ((next(timer.calls),), {}),
                rounds=max(MIN_ROUNDS, timer.rounds(SECONDS)),
                warmup_rounds=1,
            )
    except Unavailable as reason:
        pytest.skip(str(reason))
