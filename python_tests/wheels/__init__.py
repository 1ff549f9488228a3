"""``make wheel-check``: what is inside the wheels of dist/, and whether they work where nothing else is installed."""
