"""Any OpenAI-compatible URL."""
