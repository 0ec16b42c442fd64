"""Frozen text towers behind one protocol, and what can be done with their vectors without training."""
