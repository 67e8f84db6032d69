"""Functions of sequences, which attention and its alternatives can or cannot express."""
