"""Noise processes, their schedules and times, and categorical distributions."""
