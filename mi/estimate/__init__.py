"""Estimates of a run's cost and memory from its config, without running it."""
