"""Each configuration that may be chosen on a GPU is correct; in triton's interpreter (see test_triton.py)."""

import pytest

import cases
import conftest
import tolerance
from lowrank_kernels.schema import ops

if not conftest.ONLY_TRITON or conftest.ON_GPU:
    pytest.skip("runs in triton's interpreter, started by test_triton.py", allow_module_level=True)
from lowrank_kernels.triton import matmul

CASES = [
    cases.Case(M, 70, K, "nf4", 64, dtype=dtype, bias=cases.F32)
    for M, dtype in (
        (5, cases.F16),
        (40, cases.BF16),
        (130, cases.F16),
        (5, cases.F32),
        (70, cases.F32),
    )
    for K in (128, 130)
]


@pytest.mark.parametrize("op", ["linear_4bit", "linear_4bit_dx"])
@pytest.mark.parametrize("case", CASES)
def test_every_configuration(op, case, backend, monkeypatch):
    args, tried = cases.make(op, case), []

    def choose(key, configs, run, device):
        tried[:] = configs
        return configs[min(number, len(configs) - 1)]

    monkeypatch.setattr(matmul, "choose", choose)
    number = 0
    while number == 0 or number < len(tried):
        tolerance.check(op, args, getattr(ops, op)(*args))
        number += 1
    assert number >= 4
