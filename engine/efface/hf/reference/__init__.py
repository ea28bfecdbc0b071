"""The frozen model of an objective: cached log-probabilities, a second model, or the model without its adapter."""
