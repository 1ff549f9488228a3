"""The benchmark suite: ``python -m bench`` measures, ``bench.report`` writes the docs.

``bench_<op>.py`` lists cases and providers of one operator; ``harness.py`` times them with
pytest-benchmark; ``providers.py`` holds the implementations that are compared;
``results/<machine>.json`` what was measured.
"""
