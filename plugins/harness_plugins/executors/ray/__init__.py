"""Orders as tasks of Ray Core, on the nodes of a cluster or of this machine alone."""
