"""Tensor parallel on two and three processes (gloo); the checks are in workers_tensor_parallel.py."""

from __future__ import annotations

import pytest
import torch

import cases
import processes
import tolerance
from lowrank_kernels import reference
from lowrank_kernels.distributed import functional, shard_sizes

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


@pytest.mark.parametrize("first", [0, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skinny_products(dtype, first, backend):
    """S alone and its gradients, in float32, by an operator whose layer has no outputs; columns from ``first`` on."""
    M, K, R, p = 7, 96, 5, 0.3
    x, seed = cases.random_tensor(M, K, dtype=dtype), cases.random_seed()
    A = cases.random_tensor(R, K, dtype=torch.float32, scale=K**-0.5)
    ds = cases.random_tensor(M, R, dtype=torch.float32)
    mask = reference.dropout_mask(M, first + K, p, seed)[:, first:]
    masked, sizes = x.double() * mask, x.double().abs() * mask
    s = functional._shrink(x, A, p, seed, first)
    tolerance.assert_close("S", s, masked @ A.double().T, sizes @ A.double().abs().T)
    dx, dA = functional._shrink_backward(ds, x, A, p, seed, True, True, first)
    magnitude = mask * (ds.double().abs() @ A.double().abs())
    tolerance.assert_close("dx", dx, mask * (ds.double() @ A.double()), magnitude)
    tolerance.assert_close("dA", dA, ds.double().T @ masked, ds.double().abs().T @ sizes)


def test_shard_sizes():
    assert shard_sizes(4096, 4) == [1024] * 4
    assert shard_sizes(160, 2) == [96, 64]
    assert shard_sizes(97, 3) == [64, 32, 1]
    assert shard_sizes(5 * 64, 3, unit=64) == [128, 128, 64]
    with pytest.raises(ValueError, match=r"unit: expected at least 3 units, .* got 2 of 32 in 64"):
        shard_sizes(64, 3)
