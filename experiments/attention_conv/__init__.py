"""Self-attention can express convolutions: centres and sharpness, learned on digits."""
