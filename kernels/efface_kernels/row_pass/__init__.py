"""The row pass: log-probabilities of the targets and their derivatives, from a chunk of logits."""
