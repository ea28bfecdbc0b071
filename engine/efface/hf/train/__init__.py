"""Training: the trainers, their arguments, optimizer steps, checkpoints and run records."""
