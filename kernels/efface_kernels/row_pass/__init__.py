"""The row pass: one look at a chunk of logits."""
