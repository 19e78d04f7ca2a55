"""The transformer, its attention and its losses."""
