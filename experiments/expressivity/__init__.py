"""Number of parameters that networks need to fit a product of x and z."""
