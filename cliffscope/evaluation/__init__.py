"""Evaluation: what an edit does to attack success, harmless use and everything else."""
