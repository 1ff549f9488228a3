"""What this machine can do at most: memory read bandwidth and float32 matrix product."""

from .harness import LIMITS


def bench_limit(benchmark, limit):
    call = LIMITS[limit]()
    benchmark.extra_info["limit"] = limit
    benchmark.pedantic(call, rounds=8, warmup_rounds=2)
