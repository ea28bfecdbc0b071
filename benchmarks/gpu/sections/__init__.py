"""What the calls are made of: a module each, whose ``run`` is given a ``benchmarks.gpu.section.Run``."""
