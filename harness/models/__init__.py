"""What a model or adapter folder holds, found out without loading it."""
