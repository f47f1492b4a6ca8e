"""Selection: which training examples to choose."""
