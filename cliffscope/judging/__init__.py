"""Judging: whether an answer refuses, complies or is unfinished."""
