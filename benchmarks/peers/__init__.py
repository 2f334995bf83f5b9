"""Published generators of weights, rebuilt at small scale, to compare with `diffusion`."""
