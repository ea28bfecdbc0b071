"""The step suite: a whole training step of a model."""
