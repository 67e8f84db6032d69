"""Estimates of the cost and the memory of a config's run, without running it."""
