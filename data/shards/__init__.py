"""Shards: WebDataset tars with a manifest, read as they come and written in parallel, deterministic and resumable."""
