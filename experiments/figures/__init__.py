"""Figure helpers that several experiments share."""
