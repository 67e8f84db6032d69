"""Actors in threads or Ray processes that feed a learner through a queue (Sebulba)."""
