"""Training: the trainers, their arguments, steps, checkpoints and records."""
