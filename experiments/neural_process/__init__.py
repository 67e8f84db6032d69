"""Fusion of the target and the latent in the decoder of a neural process."""
