"""Pages that open from a disk: the board, an arm, samples side by side. No torch; no text of a model is ever markup."""
