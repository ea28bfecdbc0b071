"""A borrowed GPU, some minutes at a time: what is measured there, and the driver that runs it. See README.md."""
