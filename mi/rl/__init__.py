"""Multi-task reinforcement learning: IMPALA with a choice of fusions for task and instruction."""
