"""The start-up suite: the time from the start of a process to the first training step."""
