"""Losses that compare a reconstruction with its original."""
