"""Turns CASES and PROVIDERS of a module into pytest-benchmark tests, providers taking turns."""

from __future__ import annotations

import itertools

import pytest

from lowrank_kernels import backends
from lowrank_kernels.benchmark import cuda
from lowrank_kernels.benchmark.providers import Unavailable

from . import cases, limits
from .harness import Harness

LIMIT_TURNS = 4  # of a quick run: 2


def harness_of(config: pytest.Config) -> Harness:
    """The harness of this run: the one ``python -m bench`` registered, or a default one."""
    if not config.pluginmanager.has_plugin("lowrank_bench"):
        config.pluginmanager.register(Harness(), "lowrank_bench")
    return config.pluginmanager.get_plugin("lowrank_bench")


def providers_of(module, case: cases.Case) -> dict:
    """PROVIDERS of a module of the suite; those of the case's operator where there are several."""
    if hasattr(module, "providers_of"):
        return module.providers_of(case)
    return module.PROVIDERS.get(case.op, module.PROVIDERS)


def _limit_turns(config: pytest.Config) -> int:
    return LIMIT_TURNS // 2 if harness_of(config).settings.quick else LIMIT_TURNS


def _limits(turn: int) -> list[str]:
    """AVX2's not every time, and only where kernels for AVX2 are not what runs by itself."""
    if cases.DEVICE == "cuda":
        return list(cuda.LIMITS)
    with_avx2 = turn % 2 == 0 and "avx2" in backends.isas()[1:]
    return [*limits.LIMITS, *([limits.AVX2] if with_avx2 else [])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "timed_limit" in metafunc.fixturenames:
        turns = [
            pytest.param(limit, id=f"limit-{limit}-{turn}")
            for turn in range(_limit_turns(metafunc.config))
            for limit in _limits(turn)
        ]
        metafunc.parametrize("timed_limit", turns, indirect=True)
    if "timed" in metafunc.fixturenames:
        settings = harness_of(metafunc.config).settings
        of_module = [
            case
            for case in metafunc.module.CASES
            if not settings.quick or cases.SHAPES[0] == (case.N, case.K)
        ]
        turns = []
        for case, turn in itertools.product(of_module, range(settings.passes)):
            of_op = providers_of(metafunc.module, case)
            turns += [
                pytest.param((case, name, provider), id=f"{case.id}-{name}-{turn}")
                for name, provider in of_op.items()
            ]
        metafunc.parametrize("timed", turns, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Spreads the turns of the limits evenly over the run, from its start to its end.

    All cases of one shape come together, since making the weights of a large one takes seconds.
    """
    of_machine = [item for item in items if "[limit-" in item.name]
    others = [item for item in items if "[limit-" not in item.name]
    others.sort(key=_shape_index)
    items.clear()
    turns = _limit_turns(config)
    for turn in range(turns):
        items += [item for item in of_machine if item.name.endswith(f"-{turn}]")]
        if turn < turns - 1:
            part = -(-len(others) // (turns - 1))
            items += others[turn * part : (turn + 1) * part]


def _shape_index(item: pytest.Item) -> int:
    case = item.callspec.params["timed"][0]
    shapes = [*cases.SHAPES, cases.MANY_SHAPE, *cases.GROWTH_SHAPES]
    return shapes.index((case.N, case.K))


@pytest.fixture
def timed_limit(request, benchmark):
    return lambda: harness_of(request.config).time_limit(benchmark, request.param)


@pytest.fixture
def timed(request, benchmark):
    """Times this test's provider on its case; skips, with the reason, where it cannot run."""
    case, name, provider = request.param

    def run() -> None:
        try:
            harness_of(request.config).time(benchmark, case, name, provider)
        except Unavailable as reason:
            pytest.skip(str(reason))

    return run
