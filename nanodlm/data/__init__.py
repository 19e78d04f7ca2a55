"""Text to batches: sources of documents, a builder of packed rows, a pipeline.

Imports nothing, so that launch.py starts without TFDS and grain.
"""
