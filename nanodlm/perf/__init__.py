"""Performance tools: benchmark, ahead-of-time compilation."""
