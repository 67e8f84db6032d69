"""Inspection of a trained run's MI layers, by `python -m mi.inspect --workdir=RUN`."""
