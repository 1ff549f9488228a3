"""Long experiments, whose results are committed beside them; each runs as ``python -m bench.experiments.<name>``."""
