"""The attention op of msfs_functional: registration, CPU kernel, Triton kernels."""
