"""What this machine can do at most: bandwidth and matrix product."""


def bench_limit(timed_limit):
    timed_limit()
