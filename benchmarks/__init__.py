"""Benchmarks: one command per table, each with its peer beside it."""
