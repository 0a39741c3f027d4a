"""Rows to evaluate on and to align with."""
