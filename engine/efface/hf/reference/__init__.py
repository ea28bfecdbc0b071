"""The reference (frozen) model: cached log-probabilities, a second model, or the policy without its adapter."""
