"""The vLLM engine, and its server."""
