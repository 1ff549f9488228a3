"""What is compared and how: cases, the implementations of each, their check against dense float32, timing.

``python -m lowrank_kernels bench`` and the suite in bench/ of a source checkout are both made of it.
"""
