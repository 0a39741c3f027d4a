"""Models into one: merging and folding."""
