"""Sources of the native kernels, and how they are built."""
