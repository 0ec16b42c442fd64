"""Tokenised sets: shards of latents, made once, for generators and language models to read."""
