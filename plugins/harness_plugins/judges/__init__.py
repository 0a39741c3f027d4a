"""A language model as a judge: its options, its questions, who answers them."""
