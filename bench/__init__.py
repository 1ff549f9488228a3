"""The benchmark suite: ``python -m bench`` measures, ``python -m bench.report`` writes the docs.

``suite.py`` lists the cases and who computes each; ``lowrank_kernels.benchmark`` times and checks them, as for the
command line; ``providers.py`` and ``peer_*.py`` hold what only the suite compares; ``results/<machine>.json``
what was measured. ``test_ops.py`` times some of the cases with pytest-benchmark.
"""
