"""The lm_head and its loss as one operation, chunk by chunk."""
