"""What turns prompts into completions and log-likelihoods."""
