"""The scale pass: a gradient times the upstream scalar, rounded to its dtype; nothing where there is nothing to do."""
