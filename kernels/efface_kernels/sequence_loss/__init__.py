"""The sequence loss: computes loss terms and coefficients from log-probabilities, for batches of mixed kinds."""
