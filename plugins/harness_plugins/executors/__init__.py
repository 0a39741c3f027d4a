"""Who carries out steps."""
