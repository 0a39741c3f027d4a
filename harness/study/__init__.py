"""Many arms from one description."""
