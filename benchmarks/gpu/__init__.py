"""Measurements on a borrowed GPU, available for minutes at a time, and the driver that runs them. See README.md."""
