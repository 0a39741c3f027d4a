"""mergekit's YAML, read as mergekit reads it."""
