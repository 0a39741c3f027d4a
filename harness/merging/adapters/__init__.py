"""What peft adapters do to the tensors of their base, kind by kind."""
