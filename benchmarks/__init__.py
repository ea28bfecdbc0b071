"""Benchmarks: ``python -m benchmarks SUITE``. A suite is a package with a ``suite`` module; see ``__main__``."""


class BadOption(ValueError):  # noqa: N818 - not an error of the program
    """An option of a command line that its parser lets pass."""
