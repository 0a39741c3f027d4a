"""What turns answers into numbers."""
