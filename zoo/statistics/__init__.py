"""What trained weights look like: spectra, tails, similarity of layers, rows and columns."""
