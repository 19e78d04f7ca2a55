"""The HTTP server, its API and its playground."""
