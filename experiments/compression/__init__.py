"""A full MI that is trained and then compressed, against a low-rank one from scratch."""
