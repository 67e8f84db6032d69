"""Multi-task reinforcement learning: IMPALA, whose fusion of task and instruction is one word."""
