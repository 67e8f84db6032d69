"""How a neural process's decoder should meet its latent."""
