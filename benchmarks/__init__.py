"""Benchmarks: one command per table, each with its peer beside it."""

import os

# The sides of a comparison share a GPU: each takes what it needs, when it needs it.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
