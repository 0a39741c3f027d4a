"""What a plugin is and how it enters."""
