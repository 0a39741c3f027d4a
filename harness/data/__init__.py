"""Rows: which, in what order, as token ids."""
