"""An engine's own server as a child process."""
