"""Everybody else's logs as runs: lm-eval's, inspect's and AlpacaEval's files, read; lm-eval's, written."""
