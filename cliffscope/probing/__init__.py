"""Probing: residual streams, refusal probes, traces and cliffs."""
