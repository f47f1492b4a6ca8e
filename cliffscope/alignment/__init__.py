"""Alignment: which training examples repair a model."""
