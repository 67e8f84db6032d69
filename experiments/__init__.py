"""Experiments: sweeps of the two trainers, and a package with a problem for each other claim."""
