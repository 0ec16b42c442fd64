"""Samples of shards, as bytes, to samples that can become tokens."""
