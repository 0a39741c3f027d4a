"""Methods that train a model under named values: MEET, control tokens, and Chain of Hindsight."""
