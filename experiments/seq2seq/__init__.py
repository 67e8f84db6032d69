"""Functions of sequences that attention can and cannot express."""
