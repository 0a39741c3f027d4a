"""Adapters, models and reports on their way to a hub."""
