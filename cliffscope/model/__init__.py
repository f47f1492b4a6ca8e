"""Models: loading, checking, and where a model's heads are."""
