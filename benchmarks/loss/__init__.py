"""The loss suite: objectives at the head alone."""
