"""Answers and scores of models under test."""
