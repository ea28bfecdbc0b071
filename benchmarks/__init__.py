"""Benchmarks: ``python -m benchmarks SUITE``. A suite is a package with a ``suite`` module; see ``__main__``."""
