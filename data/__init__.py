"""Bytes to samples: images, videos and meshes, read, chosen, cropped and packed for training."""
