"""The sequence loss: from log-probabilities of rows to loss terms and coefficients, for a batch of mixed kinds."""
