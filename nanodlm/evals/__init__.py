"""Evaluation suites on top of a trained run."""
