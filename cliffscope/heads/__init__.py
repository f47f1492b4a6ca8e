"""Heads: edits as data, the packed sweep, and rankings with their controls."""
