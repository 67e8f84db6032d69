"""Benchmarks, each with one command that prints a table of our code and its peers."""

import os

# The sides of a comparison share a GPU: each takes what it needs, when it needs it.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
