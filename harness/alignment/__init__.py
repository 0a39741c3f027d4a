"""Training: rows and a base into an adapter."""
