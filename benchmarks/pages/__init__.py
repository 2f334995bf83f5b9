"""The pages of the benchmark: tables, figures and claims, made from the committed rows and facts alone."""
