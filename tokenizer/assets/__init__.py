"""Files of 3D assets -> meshes -> views -> voxels. Knows nothing of models; trimesh and embree are loaded when needed."""
