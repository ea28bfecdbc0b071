"""The start-up suite: what a user waits for before the first step."""
