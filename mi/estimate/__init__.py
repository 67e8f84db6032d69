"""The cost and the memory of a config, without running it."""
