"""Readouts: what a model's states say about the answer it will give."""
