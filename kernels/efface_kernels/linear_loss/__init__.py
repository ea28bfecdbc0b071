"""Losses fused with the ``lm_head``: logits are computed, read and freed chunk by chunk."""
