"""Files of 3D assets -> meshes -> views -> voxels. Knows nothing of models; loads embree when it casts rays."""
