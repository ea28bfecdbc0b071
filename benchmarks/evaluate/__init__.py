"""The evaluate suite: the log-likelihoods and greedy answers that TOFU's evaluation computes."""
