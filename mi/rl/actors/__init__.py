"""Actors that feed a learner through a queue: threads or Ray processes (Sebulba)."""
