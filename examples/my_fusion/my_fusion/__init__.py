"""A fusion, an environment and a sweep, which `mi` imports by name."""
