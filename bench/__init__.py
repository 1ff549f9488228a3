"""The benchmark suite: ``python -m bench`` measures, ``python -m bench.report`` writes the docs.

``suite.py`` lists the cases and who computes each; ``lowrank_kernels.benchmark`` times and checks them, as for the
command line; ``providers.py`` and ``peer_*.py`` hold what only the suite compares,
``variants.py`` this library in other ways; ``results/<machine>.json`` what was measured.
"""
