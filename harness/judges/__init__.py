"""Judges' annotations: win rates, agreement, calibration."""
