"""The bundled mergers: means and arcs of weights, and what is done to differences from a base."""
