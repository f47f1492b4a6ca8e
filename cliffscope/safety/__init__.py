"""Answers, their judges, and the rates of attack success and over-refusal."""
