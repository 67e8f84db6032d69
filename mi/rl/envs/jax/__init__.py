"""Environments in JAX."""
