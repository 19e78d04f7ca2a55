"""Jitted steps of training, evaluation and sampling."""
