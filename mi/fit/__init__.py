"""Small supervised problems that test claims about networks, with a trainer and a size search."""
