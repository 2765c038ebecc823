"""Modern machine-learning systems from first principles in PyTorch, the JAX way.

Models are pure functions over parameter pytrees; import what you need by module:

    from msfs_functional import optim, random
    from msfs_functional.params import functional
"""

__version__ = "0.1.0"
