"""Engines that run a sweep's members, each an ordinary `python -m mi.main …` command."""
