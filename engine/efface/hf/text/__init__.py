"""Conversion of text to token sequences: files of rows, prompt templates, and the token cache."""
