"""The data path: a source of text, tokens, packed rows on disk, batches."""
