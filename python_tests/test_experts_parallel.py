"""Experts in 4 bits on two processes (gloo); the checks are in workers_experts_parallel.py."""

from __future__ import annotations

import pytest

import processes

pytest.importorskip("transformers", reason="experts are those of transformers' models")
MODULE = "workers_experts_parallel"


@pytest.fixture(scope="module")
def outcomes():
    return processes.results(MODULE, size=2)


@pytest.mark.parametrize("check", processes.names(MODULE))
def test_two_processes(check, outcomes):
    assert outcomes[check] is None, outcomes[check]
