"""The benchmark suite: ``python -m bench`` measures, ``bench.report`` writes the docs.

``bench_<op>.py`` lists cases and providers of one operator; ``harness.py`` times them with
pytest-benchmark; ``lowrank_kernels.benchmark`` and ``peer_*.py`` hold what is compared,
``variants.py`` this library in other ways; ``report_targets.py`` says what the figures are to reach;
``results/<machine>.json`` what was measured.
"""
