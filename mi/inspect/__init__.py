"""`python -m mi.inspect --workdir=RUN`: what the MI layers of a trained run have learned."""
