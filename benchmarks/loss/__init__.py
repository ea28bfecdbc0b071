"""The loss suite: NPO at the head alone."""
