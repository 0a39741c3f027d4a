"""AlpacaEval with any judge."""
