"""A fusion, an environment and a sweep that `mi` finds by their names."""
