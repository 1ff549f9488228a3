"""Data parallel on two processes (gloo): DistributedDataParallel and FSDP2. The checks: workers_data_parallel.py."""

from __future__ import annotations

import pytest

import processes

MODULE = "workers_data_parallel"


@pytest.fixture(scope="module")
def outcomes():
    return processes.results(MODULE, size=2)


@pytest.mark.parametrize("check", processes.names(MODULE))
def test_two_processes(check, outcomes):
    assert outcomes[check] is None, outcomes[check]


@pytest.mark.slow
def test_four_processes():
    for check, outcome in processes.results("workers_two_dimensions", size=4).items():
        assert outcome is None, f"{check}: {outcome}"
