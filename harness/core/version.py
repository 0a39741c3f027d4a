"""The version of this harness."""

__version__ = "0.1.0"
