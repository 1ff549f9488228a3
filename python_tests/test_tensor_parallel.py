"""Tensor parallel on two and three processes (gloo); the checks are in workers_tensor_parallel.py."""

from __future__ import annotations

import pytest

import processes
from lowrank_kernels.distributed import shard_sizes

MODULE = "workers_tensor_parallel"


@pytest.fixture(scope="module")
def outcomes():
    return {}


@pytest.mark.parametrize("check", processes.names(MODULE))
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes(check, size, outcomes):
    if size not in outcomes:
        outcomes[size] = processes.results(MODULE, size)
    assert outcomes[size][check] is None, outcomes[size][check]


def test_shard_sizes():
    assert shard_sizes(4096, 4) == [1024] * 4
    assert shard_sizes(160, 2) == [96, 64]
    assert shard_sizes(97, 3) == [64, 32, 1]
    assert shard_sizes(5 * 64, 3, unit=64) == [128, 128, 64]
    with pytest.raises(ValueError, match=r"unit: expected at least 3 units, .* got 2 of 32 in 64"):
        shard_sizes(64, 3)
