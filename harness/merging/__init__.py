"""Models made into one: merging and folding."""
