"""What is compared and how: cases, the implementations of each, their check against dense float32, timing, tables.

``python -m lowrank_kernels bench`` and the suite in bench/ of a source checkout are both made of it. A new kind of
measurement is one entry of :data:`ops.OPS` and a provider for each implementation: a function that makes, of a case,
the calls that :mod:`timing` takes the time of.
"""
