"""Rollout and update in one program (Anakin)."""
