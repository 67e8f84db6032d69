"""How many parameters a product of x and z costs."""
