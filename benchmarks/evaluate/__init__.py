"""The evaluate suite: what TOFU's evaluation asks of a model."""
