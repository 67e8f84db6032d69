"""Self-attention can express convolutions: centers and sharpness, learned on digits."""
