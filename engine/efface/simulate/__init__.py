"""Fictitious data and small models, so that recipes run without downloads of checkpoints or data sets."""
