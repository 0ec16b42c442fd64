"""How AToken is trained: the curriculum of the paper in stages, and its decoder of 3D Gaussians apart."""
