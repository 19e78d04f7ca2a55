"""The jitted steps: training, evaluation, sampling."""
