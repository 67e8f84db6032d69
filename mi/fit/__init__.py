"""Small functions fitted, for claims about networks: problems, one trainer, a search for sizes."""
