"""Noise processes, their schedules and times, and draws from categorical laws."""
