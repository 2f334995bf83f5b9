"""Two really trained language models from the Python package index, as GGUF files, for tests and measurements."""
