"""Generation: prompts in, thinking and answers out."""
