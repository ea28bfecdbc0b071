"""Text to token sequences: files of rows, prompt templates, the cache of tokens."""
