"""Published generators of weights, rebuilt at small scale: what `diffusion` is measured beside."""
