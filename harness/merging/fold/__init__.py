"""An adapter folded into its base."""
