"""Weights added to a live model and taken out to the last bit, or added from file to file."""
