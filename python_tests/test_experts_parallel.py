"""Experts in 4 bits on two processes (gloo); the checks are in the two modules of workers below."""

from __future__ import annotations

import pytest

import processes

pytest.importorskip("transformers", reason="experts are those of transformers' models")
MODULES = "workers_experts_parallel", "workers_experts_data_parallel"


@pytest.fixture(scope="module")
def outcomes():
    return {}


@pytest.mark.parametrize(
    ("module", "check"),
    [(module, check) for module in MODULES for check in processes.names(module)],
)
def test_two_processes(module, check, outcomes):
    if module not in outcomes:
        outcomes[module] = processes.results(module, size=2)
    assert outcomes[module][check] is None, outcomes[module][check]
