"""Corpora: from named texts to token ids and batches."""
