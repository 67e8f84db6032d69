"""Sweeps of the two trainers, and a folder for each claim: problem, config, sweep."""
