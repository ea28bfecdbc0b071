"""The distribution pass: reads the logits of two models, for losses that compare full distributions."""
