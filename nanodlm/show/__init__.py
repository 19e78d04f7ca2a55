"""Views of samples and runs: terminal, replay page, report."""
