"""Figures that several experiments share."""
