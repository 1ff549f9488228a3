"""``python -m lowrank_kernels``: see :mod:`lowrank_kernels.cli`."""

from .cli import main

main()
