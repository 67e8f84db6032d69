"""Engines that run the members of a sweep, each with an ordinary `python -m mi.main …` command."""
