"""Regression with a context and few examples per task."""
