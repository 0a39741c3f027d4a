"""Tasks of lm-eval's, asked through the one open engine."""
