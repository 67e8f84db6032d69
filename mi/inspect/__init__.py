"""Inspection of the MI layers of a trained run, by `python -m mi.inspect --workdir=RUN`."""
