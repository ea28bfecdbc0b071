"""The distribution pass: one look at two chunks of logits, for losses that compare full distributions."""
