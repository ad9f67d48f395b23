"""Figures over the steps of a run, each a file. Reports and the board find them here and draw them."""
