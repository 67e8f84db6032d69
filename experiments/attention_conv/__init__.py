"""Convolutions and self-attention that can express them, trained on handwritten digits."""
