"""Builders of small open data sets: each module is one command that writes a finished store."""
