"""Training state, optimiser, metrics and checkpoints."""
