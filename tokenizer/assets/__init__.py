"""Files of 3D assets -> meshes -> views -> voxels. Knows nothing of models; loads trimesh and embree when needed."""
